# The gateway in an image: the runtime dependencies with those of every plugin, each checked by hash, and QLens
# itself.
#   docker build -t qlens .
#   docker run -p 8080:8080 -v qlens:/var/lib/qlens -e OPENAI_API_KEY ... qlens
# It serves config/production.yaml; with -v ./qlens.yaml:/etc/qlens/qlens.yaml:ro it serves yours, which must listen on
# 0.0.0.0.

FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements/all.txt requirements/build.txt requirements/
RUN python -m venv /tools && /tools/bin/pip install --no-cache-dir --require-hashes -r requirements/build.txt \
 && python -m venv --without-pip /opt/qlens \
 && /tools/bin/pip --python /opt/qlens/bin/python install --no-cache-dir --require-hashes -r requirements/all.txt
COPY pyproject.toml README.md LICENSE ./
COPY qlens qlens
COPY plugins plugins
RUN /tools/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /dist . \
 && /tools/bin/pip --python /opt/qlens/bin/python install --no-cache-dir --no-deps --no-index /dist/*.whl \
 && /opt/qlens/bin/qlens version

FROM python:3.13-slim
LABEL org.opencontainers.image.title="QLens" \
      org.opencontainers.image.description="An LLM gateway whose every stage is a plugin" \
      org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/qlens/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    QLENS_ADMIN_HOST=0.0.0.0
COPY --from=build /opt/qlens /opt/qlens
COPY config/production.yaml /etc/qlens/qlens.yaml
COPY config/prices.yaml /etc/qlens/prices.yaml
# The one folder that is written to: the ledger. A number, so that a cluster can check that it is not root.
RUN install -d -o 10001 -g 10001 /var/lib/qlens
USER 10001:10001
WORKDIR /var/lib/qlens
VOLUME /var/lib/qlens
EXPOSE 8080 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/healthz', timeout=2)"]
ENTRYPOINT ["qlens"]
CMD ["serve", "/etc/qlens/qlens.yaml"]
