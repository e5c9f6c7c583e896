# For the CPU. Data and logs stand in the folder where it is started:
#   docker build -t torchreid-snloss .
#   docker run --rm --shm-size 2g --user "$(id -u):$(id -g)" -v "$PWD:/work" torchreid-snloss \
#       --config-file configs/small.yaml
FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /source
RUN pip install --no-cache-dir /source && rm -r /source
# Caches need a home that any user may write to.
ENV HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /work
ENTRYPOINT ["torchreid-snloss"]
