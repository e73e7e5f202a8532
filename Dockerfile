# One image for serving and training: KubeRay starts Ray in it, so it holds what KubeRay's commands and probes call:
# bash, wget and `ray` on the default PATH.
#
#   docker build --build-arg VERSION=0.1.0 --tag metier:0.1.0 .
#   docker build --build-arg TORCH_INDEX=URL …      # torch built for another device, from an index of your own

ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY . .
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${PYTHON_IMAGE}
ARG VERSION=0.1.0
ARG REVISION=unknown
# Empty: torch comes from the index that pip is set up with.
ARG TORCH_INDEX=""
# More Debian packages, for example "gcc libc6-dev" where Triton compiles kernels on GPUs.
ARG SYSTEM_PACKAGES=""

RUN apt-get update \
    && apt-get install --yes --no-install-recommends bash wget ${SYSTEM_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*

COPY requirements.lock /tmp/requirements.lock
# With dependencies: a CUDA build of torch brings libraries that the lock, made with a CPU build, does not name.
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} -r /tmp/requirements.lock \
    && rm /tmp/requirements.lock
COPY --from=wheel /wheel /tmp/wheel
RUN pip install --no-cache-dir --no-deps /tmp/wheel/*.whl && rm -r /tmp/wheel

RUN groupadd --gid 10001 metier \
    && useradd --uid 10001 --gid 10001 --create-home --shell /usr/sbin/nologin metier \
    && install --directory --owner metier --group metier /var/cache/metier /data
WORKDIR /opt/metier
COPY examples examples

# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
ENV PYTHONUNBUFFERED=1

LABEL org.opencontainers.image.title="metier" \
      org.opencontainers.image.description="Fine-tuning and retrieval-grounded serving on Ray" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

CMD ["metier", "--help"]
