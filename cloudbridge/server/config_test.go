package server_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/cloudbridge/server"
)

func TestValidate(t *testing.T) {
	for _, tc := range []struct {
		name string
		c    server.Config
		want string
	}{
		{"nothing", server.Config{}, "--data is missing"},
		{"embedded", server.Config{Data: "d", MQTT: []string{":1883", "ws://:8083/mqtt"}, Local: []string{"unix:///run/x", "127.0.0.1:1884", "[::1]:1884"}}, ""},
		{"local for all", server.Config{Data: "d", Local: []string{"0.0.0.0:1884"}}, "must be unix:///path or an IP address of this host alone"},
		{"local without a host", server.Config{Data: "d", Local: []string{":1884"}}, "must be unix:///path"},
		{"local by name", server.Config{Data: "d", Local: []string{"localhost:1884"}}, "must be unix:///path"},
		{"nodes through a file", server.Config{Data: "d", MQTT: []string{"unix:///run/x"}}, "that is for --local"},
		{"one address for both", server.Config{Data: "d", MQTT: []string{"127.0.0.1:1"}, Local: []string{"127.0.0.1:1"}}, "choose two addresses"},
		{"within TLS", server.Config{Data: "d", MQTT: []string{"mqtts://:8883", "wss://:443/mqtt"}, TLSCert: "c", TLSKey: "k"}, ""},
		{"no certificate", server.Config{Data: "d", MQTT: []string{"mqtts://:8883"}}, "give --tls-cert and --tls-key"},
		{"no key", server.Config{Data: "d", TLSCert: "c"}, "--tls-cert and --tls-key go together"},
		{"a certificate for somebody else's", server.Config{Broker: "mqtt://b", TLSCert: "c", TLSKey: "k"}, "belong to the embedded one"},
		{"external", server.Config{Broker: "mqtts://b:8883", BrokerUsername: "u", BrokerPasswordFile: "f"}, ""},
		{"external and embedded", server.Config{Broker: "mqtt://b", Data: "d"}, "belong to the embedded one"},
		{"half a login", server.Config{Broker: "mqtt://b", BrokerUsername: "u"}, "go together"},
		{"login for no broker", server.Config{Data: "d", BrokerUsername: "u", BrokerPasswordFile: "f"}, "go with --broker"},
		{"no broker's address", server.Config{Broker: "http://b"}, "is not one of mqtt"},
	} {
		err := tc.c.Validate()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}

// TestKubeconfig: each wrong one ends in one line that says what to do, and the
// environment is not asked.
func TestKubeconfig(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		f := filepath.Join(dir, name)
		if err := os.WriteFile(f, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return f
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close() // nobody listens there any more
	unreachable := write("unreachable", "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: k, user: u}}]\n"+
		"clusters: [{name: k, cluster: {server: 'http://"+l.Addr().String()+"'}}]\nusers: [{name: u, user: {}}]\n")
	t.Setenv("KUBECONFIG", unreachable)
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, tc := range []struct{ name, file, want string }{
		{"none", "", "name the cluster with --kubeconfig FILE"},
		{"missing", filepath.Join(dir, "missing"), "no such file"},
		{"no YAML", write("junk", "{"), "kubectl --kubeconfig"},
		{"empty", write("empty", ""), "kubectl --kubeconfig"},
		{"unreachable", unreachable, "cannot reach the Kubernetes API at http://" + l.Addr().String()},
	} {
		err := server.Run(t.Context(), server.Config{Kubeconfig: tc.file, Data: filepath.Join(dir, "data")})
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "data")); err == nil {
		t.Error("a wrong kubeconfig made a data folder")
	}
}

// TestStartFails: what cannot be had ends the start, and leaves nothing behind.
func TestStartFails(t *testing.T) {
	c := control(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	taken := l.Addr().String()
	for _, tc := range []struct {
		name string
		c    server.Config
		want string
	}{
		{"mqtt port", server.Config{Data: t.TempDir(), MQTT: []string{taken}}, "the port is in use"},
		{"metrics port", server.Config{Data: t.TempDir(), Metrics: taken}, "the port is in use"},
		{"password file", server.Config{Broker: "mqtt://" + taken, BrokerUsername: "u", BrokerPasswordFile: "/nonexistent/password"}, "--broker-password-file"},
	} {
		tc.c.Kubeconfig = c.limited
		if err := server.Run(context.Background(), tc.c); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.want)
		}
	}
}
