#!/bin/sh
# A daemon of the cluster, with the munged that vouches for it: daemon.sh slurmctld | slurmd
set -eu
# one key for all of them, of the one that is first
key=/etc/munge/munge.key
(umask 077 && head -c 1024 /dev/urandom > "$key.$(hostname)")
ln "$key.$(hostname)" $key 2> /dev/null || [ -s $key ]
rm "$key.$(hostname)"
mkdir -p /run/munge /run/slurmd
munged --log-file=/run/munge/munged.log --seed-file=/run/munge/munged.seed
exec "$1" -D
