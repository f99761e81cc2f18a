#!/usr/bin/env bash
# Kubernetes: an Indexed Job of one pod a host, and the headless service by which pods find pod 0;
# or, with SLICES, a JobSet of one such Job a TPU slice.
#
#   export IMAGE=REGISTRY/luspo_jax:1 ACCOUNT=trainer HOSTS=4
#   bash launch/gke_job.sh --config=configs/qwen2_5_7b_dapo17k.py --workdir=gs://BUCKET/luspo_7b
#
# --dry_run prints the manifest. IMAGE is built by launch/Dockerfile. The workdir is in a bucket
# (gs://, s3://), where ACCOUNT, a service account of Kubernetes, may write; or below /runs, where
# CLAIM is mounted, a PersistentVolumeClaim that many hosts may write (ReadWriteMany: Filestore, NFS,
# Lustre). A pod that is evicted or fails is replaced, the others end and are replaced with it, and
# the run continues from its last checkpoint; a configuration that cannot run fails the Job.
#
# GPUs (the default) need no permission and no package of Kubernetes: pods get the coordinator by
# flags. TPU slices on GKE: ACCELERATOR=tpu TPU_TYPE=tpu-v5p-slice TPU_TOPOLOGY=2x2x4 CHIPS=4
# (of each host); GKE tells each pod its place in the slice, and --distributed=auto reads it.
#
# SLICES=N makes it a JobSet (its controller must be in the cluster, 0.10 or later) of N slices, each
# of HOSTS hosts and in a node pool of its own; SLICES=1 is a JobSet, too. A failure in one slice
# restarts all. GKE tells the pods of several slices of each other. Hosts of GPUs are one slice.
# QUEUE=NAME has Kueue admit the Job or JobSet through its local queue of that name.
# Variables: IMAGE, CLAIM, ACCOUNT, NAME (luspo), HOSTS (1, of a slice), GPUS (8), RETRIES (3: of each host of
# a Job, of the whole JobSet), GRACE_S (30: seconds from SIGTERM to SIGKILL), SLICES, QUEUE.
set -euo pipefail

dry_run=false flags=()
for flag in "$@"; do
  if [[ $flag == --dry_run ]]; then dry_run=true; else flags+=("$flag"); fi
done
if [[ -z ${IMAGE:-} || " ${flags[*]}" != *" --config="* || " ${flags[*]}" != *" --workdir="* ]]; then
  echo "usage: IMAGE=… bash launch/gke_job.sh [--dry_run] --config=FILE --workdir=gs://BUCKET/NAME" >&2
  exit 2
fi
if [[ -z ${CLAIM:-} && " ${flags[*]}" != *" --workdir="*"://"* ]]; then
  echo "without CLAIM, which is mounted at /runs, the workdir must be in a bucket: gs:// or s3://" >&2
  exit 2
fi
volume="emptyDir: {}" # then /runs keeps what is compiled and downloaded, as long as the pod lives
if [[ -n ${CLAIM:-} ]]; then volume="persistentVolumeClaim: {claimName: $CLAIM}"; fi
name=${NAME:-luspo} hosts=${HOSTS:-1} slices=${SLICES:-}
kind=Job coordinator=$name-0.$name
if [[ -n $slices ]]; then
  kind=JobSet coordinator=$name-slice-0-0.$name # jobset-replicated job-job-pod.network
fi
train="exec python -m experiments.train"
case ${ACCELERATOR:-gpu} in
  gpu)
    resource="nvidia.com/gpu: ${GPUS:-8}" selector="{}"
    if ((${slices:-1} > 1)); then
      echo "SLICES=$slices: hosts of GPUs are one slice, HOSTS says how many" >&2
      exit 2
    fi
    if ((hosts > 1)); then
      train+=" --coordinator=$coordinator:8476 --num_processes=$hosts"
      train+=" --process_id=\$JOB_COMPLETION_INDEX"
    fi
    ;;
  tpu)
    : "${TPU_TYPE:?names the slice, as tpu-v5p-slice}" "${TPU_TOPOLOGY:?as 2x2x4}"
    chips=$((${TPU_TOPOLOGY//x/*}))
    if ((chips != hosts * ${CHIPS:-4})); then
      echo "TPU_TOPOLOGY=$TPU_TOPOLOGY has $chips chips, and HOSTS=$hosts of CHIPS=${CHIPS:-4} make" \
        "$((hosts * ${CHIPS:-4}))" >&2
      exit 2
    fi
    if ((${slices:-1} > 1 && hosts < 2)); then
      echo "SLICES=$slices: GKE joins only slices of several hosts, and HOSTS=$hosts" >&2
      exit 2
    fi
    resource="google.com/tpu: ${CHIPS:-4}"
    selector="{cloud.google.com/gke-tpu-accelerator: $TPU_TYPE,"
    selector+=" cloud.google.com/gke-tpu-topology: \"$TPU_TOPOLOGY\"}"
    train+=" --distributed=auto"
    ;;
  *)
    echo "ACCELERATOR=$ACCELERATOR: gpu or tpu" >&2
    exit 2
    ;;
esac

queue="{}"
if [[ -n ${QUEUE:-} ]]; then queue="{kueue.x-k8s.io/queue-name: $QUEUE}"; fi

head_of_job() { # the service, and a Job down to its specification
  cat <<YAML
apiVersion: v1
kind: Service
metadata:
  name: $name
spec:
  clusterIP: None
  publishNotReadyAddresses: true
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
  labels: $queue
spec:
  backoffLimit: $((${RETRIES:-3} * hosts))
  podFailurePolicy:
    rules:
      - action: FailJob  # a flag or configuration that no restart mends
        onExitCodes: {containerName: train, operator: In, values: [2]}
      - action: Ignore  # asked to end, as processes of a preempted one are
        onExitCodes: {containerName: train, operator: In, values: [143]}
      - action: Ignore  # preemption and draining do not count
        onPodConditions: [{type: DisruptionTarget, status: "True"}]
YAML
}

head_of_jobset() { # a JobSet down to the specification of its Jobs
  local placement="{}"
  if [[ ${ACCELERATOR:-gpu} == tpu ]] && ((hosts > 1)); then
    placement="{alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool}"
  fi
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  labels: $queue
  annotations: $placement
spec:
  network: {enableDNSHostnames: true, subdomain: $name, publishNotReadyAddresses: true}
  failurePolicy:
    maxRestarts: ${RETRIES:-3}
    restartStrategy: BlockingRecreate  # no old pod holds the workdir when the new ones start
    rules:
      - name: configuration
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
        onJobFailureMessagePatterns: ["failed with exit code 2 "]
      - name: preemption  # the other rules of the Jobs
        action: RestartJobSetAndIgnoreMaxRestarts
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          backoffLimit: 0  # a failed Job restarts the JobSet
          podFailurePolicy:
            rules:
              - action: FailJob  # a flag or configuration that no restart mends
                onExitCodes: {containerName: train, operator: In, values: [2]}
              - action: FailJob  # asked to end, as processes of a preempted one are
                onExitCodes: {containerName: train, operator: In, values: [143]}
              - action: FailJob  # preemption and draining do not count
                onPodConditions: [{type: DisruptionTarget, status: "True"}]
YAML
}

rest_of_job() {
  cat <<YAML
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  podReplacementPolicy: Failed
  template:
    spec:
      subdomain: $name
      restartPolicy: Never
      serviceAccountName: ${ACCOUNT:-default}
      shareProcessNamespace: true  # so that a process, not being the first, ends when asked to
      terminationGracePeriodSeconds: ${GRACE_S:-30}
      nodeSelector: $selector
      containers:
        - name: train
          image: $IMAGE
          workingDir: /luspo_jax
          command: [sh, -c, '$train "\$@"', train]
          args:
YAML
  for flag in "${flags[@]}"; do
    flag=${flag//\\/\\\\}
    # $$ keeps Kubernetes from reading $(…) in an argument
    flag=${flag//\$\(/\$\$(}
    echo "            - \"${flag//\"/\\\"}\""
  done
  cat <<YAML
          env:
            - {name: XLA_PYTHON_CLIENT_MEM_FRACTION, value: "0.92"}
            - {name: JAX_COMPILATION_CACHE_DIR, value: /runs/.cache/xla}
            - {name: HF_HOME, value: /runs/.cache/huggingface}
          resources:
            limits: {$resource}
          volumeMounts:
            - {name: runs, mountPath: /runs}
            - {name: shm, mountPath: /dev/shm}
      volumes:
        - {name: runs, $volume}
        - {name: shm, emptyDir: {medium: Memory}}
YAML
}

manifest() {
  if [[ $kind == Job ]]; then
    head_of_job
    rest_of_job
  else
    head_of_jobset
    rest_of_job | sed 's/^/        /'
  fi
}

if $dry_run; then
  manifest
elif [[ $kind == Job ]]; then
  manifest | kubectl apply -f -
  echo "follow it: kubectl logs -f -l job-name=$name,batch.kubernetes.io/job-completion-index=0"
  echo "end it   : kubectl delete job,service $name"
else
  manifest | kubectl apply -f -
  echo "follow it: kubectl logs -f -l job-name=$name-slice-0,batch.kubernetes.io/job-completion-index=0"
  echo "end it   : kubectl delete jobset $name"
fi
