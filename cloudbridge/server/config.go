package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/cloudbridge"
	"github.com/fairlead-io/fairlead/cloudbridge/token"
)

// Config configures the cloud process. The zero value runs in a pod, with an
// embedded broker that nobody but the bridge reaches; Data is required then.
type Config struct {
	// Kubeconfig is a file, or empty (or "in-cluster") for a pod's service account.
	Kubeconfig string
	// Data is the embedded broker's folder.
	Data string
	// Version is the program's.
	Version string
	// MQTT are the listeners for nodes: host:port, mqtts://host:port, ws://host:port/path or
	// wss. Who comes there needs a node's name and token.
	MQTT []string
	// TLSCert and TLSKey are files (PEM), for listeners with mqtts and wss.
	TLSCert, TLSKey string
	// Local are the listeners for people and tools of this host, without
	// credentials: unix:///path or a loopback host:port. They read all and
	// write users' topics.
	Local []string
	// Broker is the URL of an external broker, instead of the embedded one.
	Broker, BrokerUsername, BrokerPasswordFile string
	// Namespace holds the node tokens; token.DefaultNamespace where it is empty.
	Namespace string
	// Metrics is host:port for /healthz, /readyz and /metrics; empty is none.
	Metrics string
	// DeviceStatusInterval is cloudbridge.Config's.
	DeviceStatusInterval time.Duration
	Logger               *slog.Logger
	// Listening is called once with the addresses that clients use: those of
	// MQTT, then those of Local, then Metrics.
	Listening func(addresses []string)
}

// Validate says what cannot work, without touching anything.
func (c *Config) Validate() error {
	if c.Broker != "" {
		switch {
		case len(c.MQTT) > 0 || len(c.Local) > 0 || c.Data != "" || c.TLSCert != "" || c.TLSKey != "":
			return errors.New("--broker names an external broker: --mqtt, --local, --data, --tls-cert and --tls-key belong to the embedded one, leave them out")
		case (c.BrokerUsername == "") != (c.BrokerPasswordFile == ""):
			return errors.New("--broker-username and --broker-password-file go together")
		}
		if _, err := client.ParseURL(c.Broker, nil); err != nil {
			return fmt.Errorf("--broker: %w", err)
		}
		return nil
	}
	if c.Data == "" {
		return errors.New("--data is missing: the folder of the embedded broker, such as /var/lib/fairlead-cloud (or name an external broker with --broker)")
	}
	if c.BrokerUsername != "" || c.BrokerPasswordFile != "" {
		return errors.New("--broker-username and --broker-password-file go with --broker")
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		return errors.New("--tls-cert and --tls-key go together")
	}
	for _, a := range slices.Concat(c.MQTT, c.Local) {
		if c.TLSCert == "" && (strings.HasPrefix(a, "mqtts:") || strings.HasPrefix(a, "wss:")) {
			return fmt.Errorf("%s wants a certificate and its key: give --tls-cert and --tls-key", a)
		}
	}
	for _, a := range c.Local {
		if err := checkLocal(a); err != nil {
			return err
		}
	}
	for _, a := range c.MQTT {
		if slices.Contains(c.Local, a) {
			return fmt.Errorf("%s is given to --mqtt and to --local: the one wants credentials, the other does not; choose two addresses", a)
		}
		if strings.HasPrefix(a, "unix:") {
			return fmt.Errorf("--mqtt %s: nodes do not come through a socket file; that is for --local", a)
		}
	}
	return nil
}

// checkLocal refuses listeners that another host could reach.
func checkLocal(addr string) error {
	raw := addr
	if !strings.Contains(addr, "://") {
		addr = "mqtt://" + addr
	}
	u, err := url.Parse(addr)
	if err != nil {
		return fmt.Errorf("--local %s: %w; want unix:///path or 127.0.0.1:port", raw, err)
	}
	if u.Scheme == "unix" {
		return nil
	}
	if ip := net.ParseIP(u.Hostname()); ip == nil || !ip.IsLoopback() {
		return fmt.Errorf("--local %s: clients need no credentials there, so it must be unix:///path or an IP address of this host alone, such as 127.0.0.1:1884; for the network there is --mqtt", raw)
	}
	return nil
}

// InCluster is the value of Config.Kubeconfig that names a pod's service account.
const InCluster = "in-cluster"

// restConfig reads the kubeconfig that was named, never one that the
// environment happens to hold.
func restConfig(file string) (*rest.Config, error) {
	if file == "" || file == InCluster {
		rc, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("this is no pod of a cluster: name the cluster with --kubeconfig FILE: %w", err)
		}
		return rc, nil
	}
	if _, err := os.Stat(file); err != nil {
		return nil, fmt.Errorf("--kubeconfig: %w; name a file that `kubectl --kubeconfig FILE get nodes` works with", err)
	}
	rc, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: file}, &clientcmd.ConfigOverrides{}).ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("--kubeconfig %s: %w; name a file that `kubectl --kubeconfig %s get nodes` works with", file, err, file)
	}
	return rc, nil
}

// probeTimeout bounds the first question to the API server.
const probeTimeout = 15 * time.Second

// probe asks the API server what only a working configuration can answer, so
// that a wrong one ends in one clear line instead of retries.
func probe(ctx context.Context, rc *rest.Config) error {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	dyn, err := dynamic.NewForConfig(rc)
	if err != nil {
		return fmt.Errorf("kubernetes client: %w", err)
	}
	for _, resource := range []string{"devicemodels", "devices"} {
		gvr := schema.GroupVersionResource{Group: cloudbridge.Group, Version: cloudbridge.Version, Resource: resource}
		_, err := dyn.Resource(gvr).List(ctx, metav1.ListOptions{Limit: 1})
		switch {
		case err == nil:
		case apierrors.IsNotFound(err):
			return fmt.Errorf("the cluster at %s does not know %s: run `kubectl apply -f schemas/crd -f deploy/cloud` first", rc.Host, gvr.GroupResource())
		case apierrors.IsUnauthorized(err):
			return fmt.Errorf("the API server at %s does not accept these credentials; take a fresh kubeconfig: %w", rc.Host, err)
		case apierrors.IsForbidden(err):
			return fmt.Errorf("the API server at %s denies access; deploy/cloud/rbac.yaml lists what is needed: %w", rc.Host, err)
		default:
			return fmt.Errorf("cannot reach the Kubernetes API at %s; is the server of the kubeconfig right, and up? %w", rc.Host, err)
		}
	}
	return nil
}

// external is the client configuration for an external broker.
func (c *Config) external() (client.Config, error) {
	out := client.Config{URL: c.Broker, Username: c.BrokerUsername}
	if c.BrokerPasswordFile != "" {
		b, err := os.ReadFile(c.BrokerPasswordFile)
		if err != nil {
			return out, fmt.Errorf("--broker-password-file: %w", err)
		}
		out.Password = strings.TrimRight(string(b), "\r\n")
	}
	return out, nil
}

// tls has the certificate of the listeners, where there is one.
func (c *Config) tls() (*tls.Config, error) {
	if c.TLSCert == "" {
		return nil, nil //nolint:nilnil // no listener wants one
	}
	pair, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
	if err != nil {
		return nil, fmt.Errorf("--tls-cert %s, --tls-key %s: %w", c.TLSCert, c.TLSKey, err)
	}
	return &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}, nil
}

func (c *Config) namespace() string {
	if c.Namespace == "" {
		return token.DefaultNamespace
	}
	return c.Namespace
}
