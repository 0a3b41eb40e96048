# Build and train on NVIDIA GPUs:
#   docker build -t ddk-cache .
#   docker run --gpus all --ipc host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/root/.cache/huggingface" \
#       ddk-cache build build.yaml
# --ipc host: the processes of tensor parallelism and data loaders share memory.
#
# vLLM's own image has the CUDA, the torch and the kernels that this vLLM was built for.
ARG VLLM=v0.32.0
FROM vllm/vllm-openai:${VLLM}
COPY . /src
# Both are held at their versions: what else is installed must go with them.
RUN python3 -m pip freeze | grep -iE '^(torch|vllm)==' > /tmp/held \
    && python3 -m pip install --no-cache-dir --constraint /tmp/held "/src[build,ray,lora]" \
    && rm -rf /src /tmp/held
WORKDIR /work
ENTRYPOINT ["ddk-cache"]
CMD ["--help"]
