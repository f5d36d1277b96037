"""The default run of `app.train` up to its first optimizer step, in torch alone."""

import os
import sys

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(42)
torch.set_num_threads(1)
with np.load(sys.argv[1]) as file:
    data = TensorDataset(torch.from_numpy(file["x_train"]), torch.from_numpy(file["y_train"]))
model = nn.Sequential(
    nn.Unflatten(1, (1, 40)),
    nn.Conv1d(1, 25, 5, stride=2, padding=1),
    nn.ReLU(),
    nn.Conv1d(25, 25, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Conv1d(25, 25, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(125, 10),
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
for x, y in DataLoader(data, batch_size=128, shuffle=True):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y.long()).backward()
    optimizer.step()
    os._exit(0)
