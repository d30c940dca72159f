package controlplane

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestKubeletOptions(t *testing.T) {
	// Not t.TempDir(): the path of a socket has 107 bytes at most.
	dir, err := os.MkdirTemp("", "dck")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	l, err := net.Listen("unix", filepath.Join(dir, "cri.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	good := KubeletOptions{Cluster: dir, Dir: dir, Node: "n", Runtime: "unix://" + l.Addr().String()}
	if err := good.Validate(); err != nil && os.Geteuid() == 0 {
		t.Errorf("%+v: %v", good, err)
	}
	for want, change := range map[string]func(*KubeletOptions){
		"--cluster": func(o *KubeletOptions) { o.Cluster = "" },
		"--dir":     func(o *KubeletOptions) { o.Dir = "" },
		"--node":    func(o *KubeletOptions) { o.Node = "" },
		"--runtime": func(o *KubeletOptions) { o.Runtime = "" },
		"no socket": func(o *KubeletOptions) { o.Runtime = "unix://" + dir },
	} {
		o := good
		change(&o)
		err := o.Validate()
		if os.Geteuid() != 0 && want == "no socket" {
			want = "root"
		}
		if !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want ErrUsage with %q", err, want)
		}
	}
}

func TestParseTaints(t *testing.T) {
	got, err := parseTaints([]string{"a=b:NoSchedule", "c:NoExecute"})
	if want := []taint{{"a", "b", "NoSchedule"}, {"c", "", "NoExecute"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{"a=b", "a:Never", ""} {
		if _, err := parseTaints([]string{bad}); !errors.Is(err, ErrUsage) {
			t.Errorf("%q: %v; want ErrUsage", bad, err)
		}
	}
}

func TestJoinCluster(t *testing.T) {
	f := testFolder(t)
	if _, err := f.joinCluster(folder{t.TempDir()}, "n", time.Now()); !errors.Is(err, ErrUsage) || !strings.Contains(err.Error(), "devcluster run") {
		t.Errorf("without a cluster: %v; want ErrUsage that says how to start one", err)
	}
	cluster := testFolder(t)
	certs, err := cluster.ensurePKI(loopback, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := cluster.writeConfigs("https://127.0.0.1:1234", certs); err != nil {
		t.Fatal(err)
	}
	client, err := f.joinCluster(cluster, "n", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	client.close()
	config, err := os.ReadFile(f.path("run", "kubeconfig"))
	if err != nil || !strings.Contains(string(config), "server: https://127.0.0.1:1234\n") || client.server != "https://127.0.0.1:1234" {
		t.Errorf("the node's kubeconfig: %v\n%s", err, config)
	}
}
