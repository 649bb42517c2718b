# The image of rayjob.yaml, and of cluster.yaml where nodes are to start sooner: Ray, the lock, the code.
#
#   docker build -t REGISTRY/regla-distill:TAG . && docker push REGISTRY/regla-distill:TAG
FROM rayproject/ray:2.60.0-py311-gpu
WORKDIR /home/ray/regla-distill
COPY requirements.lock .
RUN python -m pip install --no-cache-dir --require-hashes -r requirements.lock
COPY jobs jobs
COPY pipeline pipeline
COPY recipes recipes
COPY teachers teachers
