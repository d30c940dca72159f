package controlplane

import (
	"net"
	"slices"
)

// Addresses of services: the first is the service kubernetes and in the API
// server's certificate.
const serviceCIDR = "10.96.0.0/16"

var kubernetesServiceIP = net.IPv4(10, 96, 0, 1)

func apiServerArgs(dir folder, opts Options) []string {
	pki := func(name string) string { return dir.path("pki", name) }
	args := []string{
		"--etcd-servers=unix://" + EtcdSocket,
		"--bind-address=" + opts.Bind.String(),
		"--tls-cert-file=" + pki("apiserver.crt"),
		"--tls-private-key-file=" + pki("apiserver.key"),
		"--client-ca-file=" + pki("ca.crt"),
		"--authentication-config=" + dir.path("run", "authentication.json"),
		"--authorization-mode=Node,RBAC",
		"--allow-privileged=true", // as in usual clusters; pod security admission restricts it per namespace
		"--service-cluster-ip-range=" + serviceCIDR,
		"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file=" + pki("sa.pub"),
		"--service-account-signing-key-file=" + pki("sa.key"),
		"--kubelet-client-certificate=" + pki("apiserver-kubelet-client.crt"),
		"--kubelet-client-key=" + pki("apiserver-kubelet-client.key"),
		"--kubelet-preferred-address-types=InternalIP,ExternalIP,Hostname", // names of nodes are in no DNS
		// Extension API servers: fills the ConfigMap
		// kube-system/extension-apiserver-authentication.
		"--requestheader-client-ca-file=" + pki("front-proxy-ca.crt"),
		"--requestheader-allowed-names=front-proxy-client",
		"--requestheader-extra-headers-prefix=X-Remote-Extra-",
		"--requestheader-group-headers=X-Remote-Group",
		"--requestheader-username-headers=X-Remote-User",
		"--proxy-client-cert-file=" + pki("front-proxy-client.crt"),
		"--proxy-client-key-file=" + pki("front-proxy-client.key"),
		"--profiling=false",
	}
	if ip := advertisedIP(opts.Bind); ip != nil {
		args = append(args, "--advertise-address="+ip.String())
	} else {
		// Endpoints may not be loopback addresses: without this the API server would
		// fail to write its own every ten seconds. Pods could not reach it anyway.
		args = append(args, "--advertise-address="+opts.Bind.String(), "--endpoint-reconciler-type=none")
	}
	return append(args, opts.APIServerArgs...)
}

// authenticationConfig lets nobody in without credentials but to the health
// endpoints.
const authenticationConfig = `{
  "apiVersion": "apiserver.config.k8s.io/v1",
  "kind": "AuthenticationConfiguration",
  "anonymous": {
    "enabled": true,
    "conditions": [{"path": "/healthz"}, {"path": "/livez"}, {"path": "/readyz"}]
  }
}
`

// controllerManagerArgs run all default controllers, without a port: there is
// one controller manager, watched by its parent.
func controllerManagerArgs(dir folder, opts Options) []string {
	pki := func(name string) string { return dir.path("pki", name) }
	args := []string{
		"--kubeconfig=" + dir.path("run", "controller-manager.kubeconfig"),
		"--secure-port=0",
		"--leader-elect=false",
		"--use-service-account-credentials=true",
		"--service-account-private-key-file=" + pki("sa.key"),
		"--root-ca-file=" + pki("ca.crt"),
		"--cluster-signing-cert-file=" + pki("ca.crt"),
		"--cluster-signing-key-file=" + pki("ca.key"),
		"--service-cluster-ip-range=" + serviceCIDR,
		// Else it makes a folder under /usr/libexec.
		"--flex-volume-plugin-dir=" + dir.path("run", "flexvolume"),
		// With the default of 20 requests a second it throttles its own start: the
		// default service account came 5 s after the API server, not 1 s.
		"--kube-api-qps=200",
		"--kube-api-burst=400",
		"--profiling=false",
	}
	return append(args, opts.ControllerManagerArgs...)
}

func schedulerArgs(dir folder, opts Options) []string {
	args := []string{
		"--kubeconfig=" + dir.path("run", "scheduler.kubeconfig"),
		"--secure-port=0",
		"--leader-elect=false",
		"--profiling=false",
	}
	return append(args, opts.SchedulerArgs...)
}

// dialIP is the address at which this machine reaches a server bound to bind.
func dialIP(bind net.IP) net.IP {
	switch {
	case !bind.IsUnspecified():
		return bind
	case bind.To4() != nil:
		return net.IPv4(127, 0, 0, 1)
	default:
		return net.IPv6loopback
	}
}

// advertisedIP is the address at which others reach a server bound to bind, nil
// if there is none.
func advertisedIP(bind net.IP) net.IP {
	if bind.IsLoopback() {
		return nil
	}
	if !bind.IsUnspecified() {
		return bind
	}
	ips := hostIPs()
	i := slices.IndexFunc(ips, func(ip net.IP) bool { return (ip.To4() != nil) == (bind.To4() != nil) })
	if i < 0 {
		return nil
	}
	return ips[i]
}

// hostIPs are this machine's addresses that others can use.
func hostIPs() []net.IP {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil // no other addresses known: loopback still works
	}
	var ips []net.IP
	for _, addr := range addrs {
		if n, ok := addr.(*net.IPNet); ok && n.IP.IsGlobalUnicast() {
			ips = append(ips, n.IP)
		}
	}
	return ips
}
