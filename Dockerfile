# zaya on AMD's PyTorch image: ROCm 7.2.4, torch 2.10.0, triton 3.6.0, Python 3.12 in /opt/venv, gfx942 among its targets.
#
#     docker build -t zaya .
#     docker run -it --device=/dev/kfd --device=/dev/dri --group-add video --ipc=host --network=host zaya
#
# Tag and digest are those that AMD's own CI pins (ROCm/aorta, nightly sanitizer runs of August 2026). Another one:
# change this line and run `make accept-mi300x` on it. torch has to be at least 2.9 and triton 3.5.
FROM rocm/pytorch:rocm7.2.4_ubuntu24.04_py3.12_pytorch_release_2.10.0@sha256:4449f856653602317e4101a76fce599c7fcd58ccec2e539951fce5f73083179e

# Python's venv module (Ubuntu splits it off), make, and the user half of the RDMA drivers, which RCCL needs between nodes.
RUN apt-get update \
    && apt-get install -y --no-install-recommends make python3.12-venv rdma-core ibverbs-providers \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /zaya
COPY setup.py pyproject.toml Makefile LICENSE README.md ./
COPY zaya zaya
COPY tools tools
COPY recipes recipes
COPY tests tests

# Around the image's torch and triton, never over them: without a ROCm torch on the path the build stops, pip runs under constraints that
# pin both, and the last step of the set-up compares torch's version and HIP version with what was there before. No GPU is needed.
RUN python3 -c "import torch; assert torch.version.hip, torch.__version__" && make setup

ENV PATH=/zaya/.venv/bin:$PATH
CMD ["bash"]
