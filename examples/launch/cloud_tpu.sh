#!/bin/bash
# NAME=pod ZONE=us-west4-a ./cloud_tpu.sh train --config mdlm/blocks_12 \
#     --workdir /shared/runs/blocks_12 --mesh.data 16
#
# Starts a command on all hosts of a Cloud TPU that is there already; they find each other. /shared
# is a file system that all of them have mounted, with the environment that `dials` is installed in.
set -euo pipefail
: "${NAME:?of the TPU}" "${ZONE:?of the TPU}"
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="/shared/venv/bin/dials $(printf '%q ' "$@") --distributed"
