# What the scripts of the local Kubernetes share: where things lie, and how a step tells of itself.
# Sourced, never run. It changes nothing on the machine.
# shellcheck shell=bash disable=SC2034 # Names are used by the scripts that source this.

shopt -s inherit_errexit # A failure inside $(...) is a failure.

CLUSTER_SOURCE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# Everything that is kept between runs lies below here, outside the checkout.
COLLOQUY_CACHE=${COLLOQUY_CACHE:-$HOME/.cache/colloquy}
# Everything that one cluster writes lies below here; `down --purge` removes it whole.
CLUSTER_DIR=${COLLOQUY_CLUSTER_DIR:-$COLLOQUY_CACHE/cluster}
TARGET_DIR=${CARGO_TARGET_DIR:-$COLLOQUY_CACHE/target}

# The exit code that says "no kubelet can run on this machine" (EX_UNAVAILABLE of sysexits.h).
EXIT_NO_KUBELET=69

say() { printf '%s\n' "$*"; }

die() {
  printf '%s: %s\n' "$(basename "$0")" "$*" >&2
  exit 1
}

# Ends a script where a kubelet cannot run: one line that says why, and the code that callers look for.
no_kubelet() {
  printf 'no local Kubernetes here: %s\n' "$*" >&2
  exit "$EXIT_NO_KUBELET"
}

# The version of a Go module as its tool's go.mod pins it; the one place where a version is written.
pinned_version() { # TOOL MODULE
  awk -v module="$2" '
    $1 == module && $2 ~ /^v/ { print $2; exit }
    $1 == "require" && $2 == module { print $3; exit }
  ' "$CLUSTER_SOURCE/tools/$1/go.mod"
}

# The folder of a tool's finished binaries, keyed by the version.
tool_dir() { # TOOL MODULE
  printf '%s/bin/%s-%s' "$COLLOQUY_CACHE" "$1" "$(pinned_version "$1" "$2")"
}

MODULE_KUBERNETES=k8s.io/kubernetes
MODULE_ETCD=go.etcd.io/etcd/server/v3
MODULE_CONTAINERD=github.com/containerd/containerd/v2
MODULE_RUNC=github.com/opencontainers/runc
MODULE_CNI=github.com/containernetworking/plugins
MODULE_LOCAL_PATH=github.com/rancher/local-path-provisioner
MODULE_HELM=helm.sh/helm/v4

BIN_KUBERNETES=$(tool_dir kubernetes "$MODULE_KUBERNETES")
BIN_ETCD=$(tool_dir etcd "$MODULE_ETCD")
BIN_CONTAINERD=$(tool_dir containerd "$MODULE_CONTAINERD")
BIN_RUNC=$(tool_dir runc "$MODULE_RUNC")
BIN_CNI=$(tool_dir cni "$MODULE_CNI")
BIN_LOCAL_PATH=$(tool_dir local-path-provisioner "$MODULE_LOCAL_PATH")
BIN_HELM=$(tool_dir helm "$MODULE_HELM")

# The network of the cluster lies on a bridge of our own. The node's address is the bridge's, so that neither the
# API server nor the kubelet listens on an address that another machine can reach.
BRIDGE=colloquy0
NODE_NAME=colloquy
NODE_ADDRESS=10.244.0.1
POD_CIDR=10.244.0.0/24
SERVICE_CIDR=10.96.0.0/16
SERVICE_API=10.96.0.1 # The first address of SERVICE_CIDR: the API server as pods see it.
SERVICE_DNS=10.96.0.10 # Nobody answers here: nothing in Colloquy resolves names. Unset, each pod gets a warning.
CGROUP=colloquy # Below the root of each cgroup hierarchy.

KUBECONFIG_ADMIN=$CLUSTER_DIR/admin.kubeconfig
CONTAINERD_SOCKET=$CLUSTER_DIR/run/containerd.sock

# Without these kubectl and helm keep caches in the home folder.
export KUBECACHEDIR=$CLUSTER_DIR/run/kubectl HELM_CACHE_HOME=$CLUSTER_DIR/run/helm

kubectl() { "$BIN_KUBERNETES/kubectl" --kubeconfig "$KUBECONFIG_ADMIN" "$@"; }
ctr() { CONTAINERD_SUPPRESS_DEPRECATION_WARNINGS=1 "$BIN_CONTAINERD/ctr" --address "$CONTAINERD_SOCKET" --namespace k8s.io "$@"; }

# Processes. A pid file holds the pid and the start time of the process, for a pid alone may be somebody else's by now.
# This is also the order in which they start; they end in the opposite order.
COMPONENTS=(
  etcd kube-apiserver kube-controller-manager kube-scheduler containerd kubelet kube-proxy local-path-provisioner
)

start_time_of() { # PID → clock ticks since boot; nothing for a process that ended, though nobody has taken note yet
  # The command's name, in parentheses, may hold anything; behind it come the state and, 20th, the start time.
  local fields
  fields=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) || return 0
  case $fields in
    Z* | X*) ;;
    *) cut -d ' ' -f 20 <<<"$fields" ;;
  esac
}

pid_of() { # NAME → the pid, or nothing when that process is gone
  local pid started
  read -r pid started 2>/dev/null <"$CLUSTER_DIR/pids/$1" || return 1
  [[ -n $started && $(start_time_of "$pid") == "$started" ]] || return 1
  printf '%s' "$pid"
}

# Starts a component in its own session. The shell that records the pid becomes the component by `exec`.
start() { # NAME COMMAND...
  local name=$1
  shift
  # shellcheck disable=SC2016 # Expanded by the inner shell.
  setsid --fork bash -c '
    pid_file=$1
    shift
    started=$(sed "s/.*) //" /proc/$$/stat | cut -d " " -f 20)
    printf "%s %s\n" $$ "$started" >"$pid_file.partial"
    mv "$pid_file.partial" "$pid_file"
    exec "$@"
  ' "$name" "$CLUSTER_DIR/pids/$name" "$@" </dev/null >"$CLUSTER_DIR/logs/$name.log" 2>&1
}

# Ends the process of a pid: asks, waits, insists.
end_process() { # PID SECONDS_OF_GRACE
  local pid=$1 deadline=$((SECONDS + $2)) started
  started=$(start_time_of "$pid")
  [[ -n $started ]] || return 0
  kill -TERM "$pid" 2>/dev/null || return 0
  while [[ $(start_time_of "$pid") == "$started" ]]; do
    if ((SECONDS >= deadline)); then
      kill -KILL "$pid" 2>/dev/null || return 0
      deadline=$((SECONDS + 5))
    fi
    sleep 0.1
  done
}

# Waits until a command succeeds; tells what it waits for, and shows the log of the component when that dies first.
wait_for() { # SECONDS WHAT COMPONENT COMMAND...
  local limit=$1 what=$2 component=$3 started=$SECONDS
  shift 3
  until "$@" >/dev/null 2>&1; do
    if ! pid_of "$component" >/dev/null && ((SECONDS - started >= 2)); then
      tail -n 20 "$CLUSTER_DIR/logs/$component.log" >&2
      die "$component ended while waiting for $what; its log is $CLUSTER_DIR/logs/$component.log"
    fi
    if ((SECONDS - started >= limit)); then
      tail -n 20 "$CLUSTER_DIR/logs/$component.log" >&2
      die "no $what after $limit s; the logs are in $CLUSTER_DIR/logs"
    fi
    sleep 0.2
  done
  say "[up] $what ($((SECONDS - started)) s)"
}

# True on a machine whose controllers live in the one unified hierarchy.
cgroup_is_v2() { [[ -e /sys/fs/cgroup/cgroup.controllers ]]; }

# The places where a cgroup of ours may be: one folder a hierarchy.
cgroup_folders() {
  local root
  if cgroup_is_v2; then
    printf '/sys/fs/cgroup/%s\n' "$CGROUP"
  else
    for root in /sys/fs/cgroup/*/; do
      [[ -L ${root%/} ]] || printf '%s%s\n' "$root" "$CGROUP"
    done
  fi
}

# Kernel settings that a kubelet, a bridge or kube-proxy changes: `up` notes them down, `down` sets them back.
SYSCTLS=(
  kernel/keys/root_maxbytes kernel/keys/root_maxkeys kernel/panic kernel/panic_on_oops vm/overcommit_memory
  vm/panic_on_oom net/ipv4/ip_forward net/bridge/bridge-nf-call-iptables net/ipv4/conf/all/route_localnet
)

# Paths outside our folder that containerd and the kubelet insist on. They see folders of ours there, bound over the
# real ones inside a mount namespace of their own; outside, empty folders are all that appears, and `down` removes them.
FOREIGN_FOLDERS=(/run/containerd /var/lib/kubelet /var/log/containers)
