# An image in which the quickstart runs:
#
#   docker build --tag zsnr .
#   docker run --rm --volume "$PWD/runs:/zsnr/runs" zsnr
#
# Training with several loading processes needs more shared memory: --shm-size=8g.
FROM python:3.11-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /zsnr
COPY . .
RUN make install
CMD ["make", "quickstart"]
