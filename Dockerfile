# The worker's image: Ollama, the models and rp_handler.py on a slim Python.
#
#   docker build --platform linux/amd64 -t worker .
#   docker build --platform linux/amd64 -t worker --build-arg MODELS=llama3.2:3b .
#
# Layers come in the order in which they change: models, Ollama, Python packages, code.
# A worker that has the last version pulls only what changed.

ARG OLLAMA_IMAGE=ollama/ollama:0.32.15
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
# Each of the first two has a layer of its own; further ones share a third.
ARG MODELS="llama3:latest qwen2.5:7b"
# cuda_v12 or cuda_v13: needs no Debian package, as vulkan would.
ARG GPU_LIBRARY=cuda_v12


FROM ${OLLAMA_IMAGE} AS models
ARG MODELS
# Not the usual port: a builder may share its host's network, and so an Ollama that runs there.
ENV OLLAMA_HOST=127.0.0.1:11533
RUN set -eu; \
    server=; trap 'kill "$server" 2>/dev/null || true' EXIT; \
    [ -n "$MODELS" ] || { echo "MODELS names no model" >&2; exit 1; }; \
    mkdir -p /models/1 /models/2 /models/rest; \
    number=0; \
    for model in $MODELS; do \
        number=$((number + 1)); \
        store=/models/rest; [ "$number" -gt 2 ] || store=/models/$number; \
        OLLAMA_MODELS=$store ollama serve & server=$!; \
        tries=0; \
        until ollama list >/dev/null 2>&1; do \
            tries=$((tries + 1)); [ "$tries" -lt 300 ]; \
            kill -0 "$server"; \
            sleep 0.2; \
        done; \
        ollama pull "$model"; \
        name=$model; case $model in *:*) ;; *) name=$model:latest ;; esac; \
        ollama list | awk '{ print $1 }' | grep -Fxq "$name"; \
        kill "$server"; wait "$server" || true; \
    done


FROM ${OLLAMA_IMAGE} AS ollama
ARG GPU_LIBRARY
# GPU discovery tries each folder here for up to 30 s; llama-quantize serves `ollama create` only.
RUN set -eu; \
    cd /usr/lib/ollama; \
    [ -d "$GPU_LIBRARY" ] || { echo "no GPU library $GPU_LIBRARY in" */ >&2; exit 1; }; \
    for folder in */; do [ "$folder" = "$GPU_LIBRARY/" ] || rm -r "${folder%/}"; done; \
    rm -f llama-quantize
# --slot-prompt-similarity has no variable in llama.cpp [common/arg.cpp] and no setting in Ollama, which
# starts the script that adds it like the binary. That one stays where its libraries are.
RUN set -eu; \
    cd /usr/lib/ollama; \
    mv llama-server llama-server.real; \
    printf '#!/bin/sh\n%s\n' > llama-server \
      'exec "$0.real" "$@" ${SLOT_PROMPT_SIMILARITY:+--slot-prompt-similarity "$SLOT_PROMPT_SIMILARITY"}'; \
    chmod 755 llama-server


FROM ${PYTHON_IMAGE} AS packages
COPY requirements.txt /tmp/
RUN python -m venv --without-pip /opt/venv \
 && pip --python /opt/venv/bin/python install --no-cache-dir --no-compile -r /tmp/requirements.txt
# Bytecode of what a worker imports, and of nothing else: 6 MB instead of 46, and 0.5 s of each
# cold start. Unchecked hashes, because a builder may change a file's time, which would void it.
RUN PYTHONDONTWRITEBYTECODE=1 /opt/venv/bin/python -c "import sys, dotenv, psutil, requests, runpod; \
[print(m.__file__) for m in sys.modules.values() if '/opt/venv/' in (getattr(m, '__file__', '') or '')]" \
    > /tmp/imported \
 && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash -i /tmp/imported


FROM ${PYTHON_IMAGE}
# Not under /root or /runpod-volume, which a mounted volume would hide.
COPY --from=models /models/1 /opt/models
COPY --from=models /models/2 /opt/models
COPY --from=models /models/rest /opt/models
COPY --from=ollama /usr/bin/ollama /usr/bin/ollama
COPY --from=ollama /usr/lib/ollama /usr/lib/ollama
# Built on AlmaLinux 8, run on Debian: a missing library fails the build, not the first job.
RUN libraries=$(ldd /usr/lib/ollama/llama-server.real) && ! echo "$libraries" | grep 'not found'
COPY --from=packages /opt/venv /opt/venv

ARG MODELS GPU_LIBRARY
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RUNPOD_LOG_LEVEL=INFO \
    MODELS=$MODELS \
    OLLAMA_MODELS=/opt/models \
    OLLAMA_HOST=127.0.0.1:11434 \
    OLLAMA_KEEP_ALIVE=-1 \
    OLLAMA_NO_CLOUD=1 \
    OLLAMA_NOPRUNE=1 \
    OLLAMA_CONTEXT_LENGTH=4096 \
    OLLAMA_LLM_LIBRARY=$GPU_LIBRARY \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib:/usr/local/nvidia/lib64 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Calls of one assistant share a system prompt, so at 0.1, llama.cpp's default, their turns wipe out each
# other's history in one slot. Where less of a turn's prompt than this lies in any slot, its history comes
# out of a cache in memory instead: up to so many MiB for each loaded model.
ENV SLOT_PROMPT_SIMILARITY=0.95 \
    LLAMA_ARG_CACHE_RAM=4096
LABEL org.opencontainers.image.title="Ollama worker for RunPod serverless" \
      org.opencontainers.image.description="Answers chat jobs, OpenAI calls and VAPI webhooks with Ollama's models"
WORKDIR /app
COPY rp_handler.py test_input.json ./
# Exec form: Python is the first process, so it gets RunPod's TERM and the container ends with it.
CMD ["python", "rp_handler.py"]
