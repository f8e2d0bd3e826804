# The cluster's certificates and kubeconfigs, made by openssl, new at each start. Sourced by `up`.
# shellcheck shell=bash

PKI=$CLUSTER_DIR/pki
CERTIFICATE_DAYS=365 # A cluster for tests is started again long before.

make_authority() {
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$CERTIFICATE_DAYS" \
    -keyout "$PKI/ca.key" -out "$PKI/ca.crt" -subj "/CN=colloquy-test-ca" \
    -addext "basicConstraints=critical,CA:TRUE" -addext "keyUsage=critical,keyCertSign,cRLSign" 2>/dev/null
}

# One certificate, for a server (with alternative names) or a client (its groups and user in the subject).
make_certificate() { # NAME SUBJECT USAGE [ALTERNATIVE_NAMES]
  local name=$1 subject=$2 usage=$3 alternative_names=${4:-}
  openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
    -keyout "$PKI/$name.key" -out "$PKI/$name.csr" -subj "$subject" 2>/dev/null
  {
    echo "basicConstraints=critical,CA:FALSE"
    echo "keyUsage=critical,digitalSignature"
    echo "extendedKeyUsage=$usage"
    [[ -z $alternative_names ]] || echo "subjectAltName=$alternative_names"
  } >"$PKI/$name.ext"
  openssl x509 -req -in "$PKI/$name.csr" -CA "$PKI/ca.crt" -CAkey "$PKI/ca.key" -CAcreateserial \
    -days "$CERTIFICATE_DAYS" -extfile "$PKI/$name.ext" -out "$PKI/$name.crt" 2>/dev/null
  rm "$PKI/$name.csr" "$PKI/$name.ext"
}

# A kubeconfig carries its certificates inside, so that it can be copied and read alone.
make_kubeconfig() { # NAME FILE
  cat >"$2" <<YAML
apiVersion: v1
kind: Config
current-context: colloquy
clusters:
- name: colloquy
  cluster:
    server: https://$NODE_ADDRESS:6443
    certificate-authority-data: $(base64 -w 0 "$PKI/ca.crt")
users:
- name: $1
  user:
    client-certificate-data: $(base64 -w 0 "$PKI/$1.crt")
    client-key-data: $(base64 -w 0 "$PKI/$1.key")
contexts:
- name: colloquy
  context: {cluster: colloquy, user: $1}
YAML
}

make_client() { # NAME SUBJECT
  make_certificate "$1" "$2" clientAuth
  make_kubeconfig "$1" "$CLUSTER_DIR/config/$1.kubeconfig"
}

make_certificates() {
  (
    umask 077
    mkdir -p "$PKI"
    make_authority
    make_certificate kube-apiserver "/CN=kube-apiserver" serverAuth \
      "IP:$NODE_ADDRESS,IP:$SERVICE_API,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local"
    make_certificate kube-apiserver-to-kubelet "/O=system:masters/CN=kube-apiserver-to-kubelet" clientAuth
    make_certificate kubelet-serving "/CN=$NODE_NAME" serverAuth "IP:$NODE_ADDRESS,DNS:$NODE_NAME"
    make_client kube-controller-manager "/CN=system:kube-controller-manager"
    make_client kube-scheduler "/CN=system:kube-scheduler"
    make_client kube-proxy "/CN=system:kube-proxy"
    make_client kubelet "/O=system:nodes/CN=system:node:$NODE_NAME"
    make_client local-path-provisioner "/CN=local-path-provisioner"
    make_certificate admin "/O=system:masters/CN=admin" clientAuth
    make_kubeconfig admin "$KUBECONFIG_ADMIN"
    openssl ecparam -name prime256v1 -genkey -noout -out "$PKI/service-accounts.key" 2>/dev/null
    openssl ec -in "$PKI/service-accounts.key" -pubout -out "$PKI/service-accounts.pub" 2>/dev/null
  )
}
