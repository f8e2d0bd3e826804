# The configuration files of containerd, its network plugins, the kubelet and kube-proxy. Sourced by `up`.
# shellcheck shell=bash disable=SC2034 # Names are used by the scripts that source this.

IMAGE_PAUSE=colloquy.dev/pause:1
IMAGE_VOLUME_HELPER=colloquy.dev/volume-helper:1

write_configuration() {
  local config=$CLUSTER_DIR/config snapshotter=overlayfs
  # An overlay cannot lie on an overlay; a container's own root is one. Copies are slower, but work everywhere.
  [[ $(stat -f -c %T "$CLUSTER_DIR") != overlayfs ]] || snapshotter=native

  # restrict_oom_score_adj: without CAP_SYS_RESOURCE a container that wants a lower score than ours cannot start.
  # The pinned image keeps containerd from asking a registry for its sandbox.
  cat >"$config/containerd.toml" <<TOML
version = 3
root = "$CLUSTER_DIR/containerd"
state = "$CLUSTER_DIR/run/containerd"
disabled_plugins = ["io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]

[grpc]
address = "$CONTAINERD_SOCKET"

[plugins."io.containerd.cri.v1.images"]
snapshotter = "$snapshotter"

[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "$IMAGE_PAUSE"

[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["$BIN_CNI"]
conf_dir = "$config/cni"

[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "runc"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = "$BIN_RUNC/runc"
Root = "$CLUSTER_DIR/run/runc"
SystemdCgroup = false
TOML

  # hairpinMode: a pod reaches itself through its own service. No masquerade: pods have no business off the machine.
  mkdir -p "$config/cni"
  cat >"$config/cni/10-colloquy.conflist" <<JSON
{
  "cniVersion": "1.0.0",
  "name": "colloquy",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "$BRIDGE",
      "isGateway": true,
      "ipMasq": false,
      "hairpinMode": true,
      "ipam": {
        "type": "host-local",
        "dataDir": "$CLUSTER_DIR/run/addresses",
        "ranges": [[{"subnet": "$POD_CIDR", "gateway": "$NODE_ADDRESS"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
JSON

  # Images come from `images` alone, so the kubelet must never collect them; eviction starts late, for the machine is
  # shared with compilers.
  cat >"$config/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $NODE_ADDRESS
healthzBindAddress: 127.0.0.1
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: $PKI/ca.crt}
authorization: {mode: Webhook}
tlsCertFile: $PKI/kubelet-serving.crt
tlsPrivateKeyFile: $PKI/kubelet-serving.key
containerRuntimeEndpoint: unix://$CONTAINERD_SOCKET
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP
failCgroupV1: false
failSwapOn: false
clusterDNS: [$SERVICE_DNS]
clusterDomain: cluster.local
podLogsDir: $CLUSTER_DIR/logs/pods
volumePluginDir: $CLUSTER_DIR/kubelet/volume-plugins
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
evictionHard:
  memory.available: 100Mi
  nodefs.available: 1%
  nodefs.inodesFree: 1%
  imagefs.available: 1%
YAML

  # Conntrack's limits belong to the machine: zero leaves them as they are.
  cat >"$config/kube-proxy.yaml" <<YAML
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
hostnameOverride: $NODE_NAME
clusterCIDR: $POD_CIDR
healthzBindAddress: 127.0.0.1:10256
metricsBindAddress: 127.0.0.1:10249
clientConnection: {kubeconfig: $config/kube-proxy.kubeconfig}
conntrack: {maxPerCore: 0, min: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}
YAML

  cat >"$config/local-path.json" <<JSON
{"nodePathMap": [{"node": "DEFAULT_PATH_FOR_NON_LISTED_NODES", "paths": ["$CLUSTER_DIR/volumes"]}]}
JSON
}
