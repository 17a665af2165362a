# One image for every role: kos up (a node), kosproxy or koscache alone.
#
#   docker build -t kos .
#   docker run -v ./kos.yaml:/etc/kos/kos.yaml:ro -v kos-cache:/var/lib/kos -p 9000:9000 kos
#
# In the file listen.s3 is 0.0.0.0:9000 (the default, loopback, cannot be reached from outside) and cache.dir is below
# /var/lib/kos. Uid 10001 reads the one and writes the other. /tmp must be writable: metrics of the processes are kept there.
#
# `kos up` as the first process reaps its own children and passes signals on; it needs no init. Give it as long to stop
# as limits.drain says, and some: docker stop --time 30. In Kubernetes: configs/k8s.

ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && python -m venv --without-pip /opt/kos
# Dependencies first: a change of the source alone builds from here on in seconds.
COPY pyproject.toml README.md ./
COPY kos/__init__.py kos/__init__.py
RUN pip --python /opt/kos install --no-cache-dir --no-compile .
COPY kos kos
COPY koscache koscache
COPY kosproxy kosproxy
COPY koscli koscli
COPY mirror mirror
RUN pip --python /opt/kos install --no-cache-dir --no-compile --no-deps --force-reinstall . \
 && find /opt/kos -name tests -type d -prune -exec rm -rf {} + \
 && /opt/kos/bin/python -m compileall -q /opt/kos/lib

FROM python:${PYTHON}-slim
COPY --from=build /opt/kos /opt/kos
COPY configs/kos.yaml /usr/share/kos/kos.yaml
RUN groupadd --system --gid 10001 kos \
 && useradd --system --uid 10001 --gid kos --home-dir /var/lib/kos --shell /usr/sbin/nologin kos \
 && install -d -o kos -g kos -m 0750 /var/lib/kos
ENV PATH=/opt/kos/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
VOLUME /var/lib/kos
EXPOSE 9000 9001 9002 9003 9443
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s CMD ["kos", "status"]
ENTRYPOINT []
CMD ["kos", "up", "--config", "/etc/kos/kos.yaml"]
