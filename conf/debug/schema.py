"""Short runs that find faults, beside any other choice, in folders of their own; never continued.

| preset  | what it is                                                                       |
|---------|----------------------------------------------------------------------------------|
| fast    | one micro-batch of everything, in one epoch                                      |
| limit   | a few micro-batches of everything, in three epochs                               |
| overfit | the same three micro-batches in fifty epochs: a model that can learn knows them  |
| profile | twenty micro-batches; a table and a trace of where the time goes                 |
| nan     | the whole run; the operation that made a NaN gradient is named                   |

What is typed beside it stays as typed. A preset of your own is a file as these.
"""

PRESETS: dict[str, type] = {}
