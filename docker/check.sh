#!/usr/bin/env bash
# Builds the images and runs them:
#
#   docker/check.sh                  # cpu, gpu and slurm
#   BUILD_ARGS="--build-arg PIP_INDEX_URL=https://mirror/simple" docker/check.sh cpu slurm
#
# Exits with 77 where no Docker engine answers.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- cpu gpu slurm
read -ra build_args <<< "${BUILD_ARGS-}"

if ! engine=$(timeout 30 docker version --format '{{.Server.Version}}' 2>&1); then
    echo "no Docker engine answers: ${engine##*$'\n'}" >&2
    exit 77
fi
echo "engine $engine"

build() {
    docker build --file docker/Dockerfile "${build_args[@]}" "$@" .
}

confined() {
    docker run --rm --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
        --network none "$@"
}

# a project of its own: `down` must not take the volumes of a cluster that somebody uses
compose() {
    docker compose --project-name app-check --file docker/compose.yaml "$@"
}

check_cpu() {
    build --tag app
    test "$(confined app id -u)" = 10001
    volume=$(docker volume create)
    trap 'docker volume rm "$volume"' EXIT
    confined --volume "$volume:/work" app averaging=ema trainer.max_epochs=2 name=check
    confined --volume "$volume:/work" app python -m app.report runs/check
}

check_gpu() {
    build --tag app:gpu --build-arg DEVICE=gpu
    confined app:gpu python -c 'import torch; assert torch.version.cuda, torch.__version__'
    if docker info --format '{{json .Runtimes}}' | grep -q '"nvidia"'; then
        confined --gpus all app:gpu trainer.accelerator=gpu trainer.max_epochs=2
    else
        echo "no GPU is run on: the engine has no runtime named nvidia"
        confined app:gpu trainer.accelerator=cpu trainer.max_epochs=2
    fi
}

check_slurm() {
    build --tag app:slurm --target slurm
    trap 'compose down --volumes' EXIT
    compose up --no-build --wait || { compose logs --tail 50; return 1; }
    compose exec -T controller python -m app.train launch=slurm trainer.num_nodes=2 \
        trainer.devices=2 strategy=ddp trainer.max_epochs=2 name=check
    compose exec -T controller python -m app.report runs/check
}

for what; do
    ("check_$what")
    echo "$what: right"
done
