# Completes `python -m app.train`. All other words behind python are completed as they were before.
function __app_is_meant
    set -l words (commandline -opc)
    test (count $words) -ge 3; and test "$words[2]" = -m; and string match -q 'app.*' -- $words[3]
end
function __app_choices
    set -l words (commandline -opc)
    set -lx COMP_LINE (string join ' ' -- $words[3..-1] (commandline -ct))
    $words[1] -m $words[3] -sc query=bash 2>/dev/null | string split -n ' '
end
for python in python python3
    complete -c $python -n __app_is_meant -f -a '(__app_choices)'
end
