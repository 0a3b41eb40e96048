# Build and train on NVIDIA GPUs:
#   docker build -t ddk-cache .
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/work" \
#       -v "$HOME/.cache/huggingface:/home/ddk/.cache/huggingface" ddk-cache build build.yaml
# --ipc host: the processes of tensor parallelism and data loaders share memory.
# --user: what is written in /work is yours. Make the mounted cache's folder first, or root will own it.
#
# vLLM's own image has the CUDA, the torch and the kernels that this vLLM was built for.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
COPY . /src
# Both are held at their versions: what else is installed must go with them. The packages say which they are,
# since pip freeze names a wheel's file instead of the version where it was installed from one.
RUN python3 -c 'from importlib.metadata import version; [print(f"{p}=={version(p)}") for p in ("torch", "vllm")]' \
        > /tmp/held \
    && python3 -m pip install --no-cache-dir --constraint /tmp/held "/src[build,train,ray,lora]" \
    && rm -rf /src /tmp/held
# Any user may run it: vLLM, Triton and torch keep compiled kernels in HOME, and torch asks for a user's name.
ENV HOME=/home/ddk USER=ddk
RUN mkdir -p /home/ddk/.cache && chmod 1777 /home/ddk /home/ddk/.cache
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["ddk-cache"]
CMD ["--help"]
