#!/bin/sh
# The image's entry point: overrides and options are app.train's, anything else is a command.
case ${1-} in
    -* | *=*) set -- python -m app.train "$@" ;;
esac
exec tini -s -- "$@" # process 1 has to end the processes that others left
