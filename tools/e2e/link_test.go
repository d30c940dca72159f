package e2e

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// A node behind an HTTP-only way out dials the cloud by WebSocket.
func TestLinkOverWebSocket(t *testing.T) {
	s := newSite(t, "l-ws", "--cloud", cloudWS)
	s.slave.Set("input", levelInput, 42)
	s.reading(fab.CloudLocal, "level", value("42"))
	kubectl(t, "-n", s.ns, "patch", "device", "pump-1", "--type", "merge", "-p", `{"spec":{"desired":{"speed":12}}}`)
	s.register(speedHolding, 12)
	s.agree()
}

// A cloud that is there but does not answer any more is noticed by the
// keepalive; when it answers again both sides agree.
func TestHalfOpenLink(t *testing.T) {
	s := newSite(t, "l-half", "--keepalive", "2s")
	s.reading(fab.CloudLocal, "level", value("0"))
	link := func(online bool) {
		t.Helper()
		w := watch(t, s.edge.Bus, string(topic.ReportedLink(s.edge.Node)))
		w.until(t, "the node knows its link", func(_ string, p []byte) bool {
			var l payload.Link
			return json.Unmarshal(p, &l) == nil && l.Online == online
		})
	}
	link(true)
	signal(t, fab.Cloud.PID(), syscall.SIGSTOP)
	defer signal(t, fab.Cloud.PID(), syscall.SIGCONT)
	link(false)
	if err := s.set("speed", "21"); err != nil {
		t.Fatal(err)
	}
	s.register(speedHolding, 21)
	signal(t, fab.Cloud.PID(), syscall.SIGCONT)
	link(true)
	m := s.agree()
	if tg := m[string(s.target("speed"))]; !strings.Contains(tg, `"v":21`) {
		t.Errorf("the local wish did not reach the cloud: %q", tg)
	}
}

func signal(t *testing.T, pid int, sig os.Signal) {
	t.Helper()
	p, err := os.FindProcess(pid)
	if err == nil {
		err = p.Signal(sig)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Every way to start wrongly ends at once, with what to do.
func TestStartErrors(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	dir := t.TempDir()
	edge := func(args ...string) []string {
		return append([]string{"fairlead-edge", "run", "--data", dir + "/edge"}, args...)
	}
	cloud := func(args ...string) []string {
		return append([]string{"fairlead-cloud", "run", "--data", dir + "/cloud"}, args...)
	}
	bad := dir + "/bad.kubeconfig"
	if err := os.WriteFile(bad, []byte("this is no kubeconfig"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"no node":            {edge(), "--node"},
		"bad node":           {edge("--node", "Plant 7"), "lower case"},
		"port in use":        {edge("--node", "n", "--mqtt", fab.CloudLocal), "in use"},
		"cloud, no token":    {edge("--node", "n", "--cloud", "mqtt://"+fab.CloudMQTT), "fairlead token create"},
		"no kubeconfig":      {cloud("--kubeconfig", dir+"/none", "--mqtt", "127.0.0.1:0"), "none"},
		"bad kubeconfig":     {cloud("--kubeconfig", bad, "--mqtt", "127.0.0.1:0"), bad},
		"not in a cluster":   {cloud("--mqtt", "127.0.0.1:0"), "--kubeconfig"},
		"cloud port in use":  {cloud("--kubeconfig", fab.Kubeconfig, "--mqtt", fab.CloudMQTT), "in use"},
		"local is not local": {cloud("--kubeconfig", fab.Kubeconfig, "--mqtt", "127.0.0.1:0", "--local", "0.0.0.0:0"), "this host alone"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := fab.Run(ctx, c.args[0], c.args[1:]...)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want an error with %q", err, c.want)
			}
		})
	}
}
