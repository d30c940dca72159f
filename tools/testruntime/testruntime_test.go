package testruntime_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// patience is how long a test waits for what must come.
const patience = time.Minute

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

type cri struct {
	runtimeapi.RuntimeServiceClient
	t   *testing.T
	ctx context.Context
}

func dial(t *testing.T, rt *testruntime.Runtime) cri {
	t.Helper()
	conn, err := grpc.NewClient(rt.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	t.Cleanup(func() { cancel(); conn.Close() })
	return cri{RuntimeServiceClient: runtimeapi.NewRuntimeServiceClient(conn), t: t, ctx: ctx}
}

// run starts a pod with one container and gives its sandbox, container and IP.
func (c cri) run(rt *testruntime.Runtime, name, cgroup string, ports []*runtimeapi.PortMapping, cmd ...string) (sandbox, container, ip string) {
	c.t.Helper()
	config := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name + "-uid"},
		LogDirectory: filepath.Join(rt.Dir, "logs", name),
		PortMappings: ports,
		Linux:        &runtimeapi.LinuxPodSandboxConfig{CgroupParent: cgroup},
	}
	s, err := c.RunPodSandbox(c.ctx, &runtimeapi.RunPodSandboxRequest{Config: config})
	if err != nil {
		c.t.Fatal(err)
	}
	made, err := c.CreateContainer(c.ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId: s.PodSandboxId, SandboxConfig: config,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "main"},
			Image:    &runtimeapi.ImageSpec{Image: testruntime.Busybox},
			Command:  cmd, LogPath: "main.log",
		},
	})
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.StartContainer(c.ctx, &runtimeapi.StartContainerRequest{ContainerId: made.ContainerId}); err != nil {
		c.t.Fatal(err)
	}
	st, err := c.PodSandboxStatus(c.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: s.PodSandboxId})
	if err != nil {
		c.t.Fatal(err)
	}
	return s.PodSandboxId, made.ContainerId, st.Status.Network.GetIp()
}

func (c cri) state(container string) runtimeapi.ContainerState {
	c.t.Helper()
	s, err := c.ContainerStatus(c.ctx, &runtimeapi.ContainerStatusRequest{ContainerId: container})
	if err != nil {
		c.t.Fatal(err)
	}
	return s.Status.State
}

func freePort(t *testing.T) int32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

func TestPod(t *testing.T) {
	rt := testruntime.Start(t)
	c := dial(t, rt)
	port := freePort(t)
	_, id, ip := c.run(rt, "web", rt.Cgroup, []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: port, HostIp: "127.0.0.1"}},
		"sh", "-c", "mkdir /tmp/www; echo hello > /tmp/www/index.html; echo serving; exec httpd -f -p 80 -h /tmp/www")
	if !rt.Subnet.Contains(net.ParseIP(ip)) {
		t.Errorf("pod IP %s, want one of %s", ip, &rt.Subnet)
	}
	for _, addr := range []string{net.JoinHostPort(ip, "80"), fmt.Sprintf("127.0.0.1:%d", port)} {
		eventually(t, "the pod answers at "+addr, func() bool {
			conn, err := net.DialTimeout("tcp", addr, time.Second)
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
	if got := c.state(id); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container is %s", got)
	}
}

func TestKills(t *testing.T) {
	rt := testruntime.Start(t)
	c := dial(t, rt)
	sandbox, id, _ := c.run(rt, "a", rt.Cgroup+"/a", nil, "sleep", "1000000")
	rt.Kill()
	if err := rt.Restart(); err != nil {
		t.Fatal(err)
	}
	if got := c.state(id); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after kill -9 of containerd: container is %s", got)
	}

	if err := rt.KillContainers(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "containerd sees the container exit", func() bool { return c.state(id) == runtimeapi.ContainerState_CONTAINER_EXITED })

	_, id, _ = c.run(rt, "b", "", nil, "sleep", "1000000")
	if err := rt.PowerCut(); err != nil {
		t.Fatal(err)
	}
	if left := traces(t, rt, id); len(left) > 1 || len(left) == 1 && left[0] != "network bridge" {
		t.Errorf("left after a power cut: %q", left)
	}
	if err := rt.Restart(); err != nil {
		t.Fatal(err)
	}
	if got := c.state(id); got == runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("after a power cut: container is %s", got)
	}
	st, err := c.PodSandboxStatus(c.ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: sandbox})
	if err != nil {
		t.Fatal(err)
	}
	if st.Status.State != runtimeapi.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("after a power cut: sandbox is %s", st.Status.State)
	}
}

// traces are what is left of a runtime on the machine, but for its folder.
func traces(t *testing.T, rt *testruntime.Runtime, containers ...string) []string {
	t.Helper()
	var left []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, rt.Dir+"/") {
			left = append(left, "mount "+line)
		}
	}
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		for _, file := range []string{"cmdline", "mountinfo"} {
			b, err := os.ReadFile(filepath.Join(p, file))
			if err == nil && strings.Contains(string(b), rt.Dir+"/") && filepath.Base(p) != fmt.Sprint(os.Getpid()) {
				left = append(left, "process "+p+" "+file)
			}
		}
	}
	patterns := []string{"/sys/fs/cgroup" + rt.Cgroup, "/sys/fs/cgroup/*" + rt.Cgroup, "/var/lib/cni/results/" + rt.Bridge + "-*"}
	for _, id := range containers {
		patterns = append(patterns, "/sys/fs/cgroup/k8s.io/"+id, "/sys/fs/cgroup/*/k8s.io/"+id)
	}
	for _, pattern := range patterns {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		left = append(left, found...)
	}
	if _, err := net.InterfaceByName(rt.Bridge); err == nil {
		left = append(left, "network bridge")
	}
	if out, err := exec.Command("iptables", "-w", "-t", "nat", "-S").Output(); err == nil && strings.Contains(string(out), `"`+rt.Bridge+`\"`) {
		left = append(left, "firewall rules: "+string(out))
	}
	return left
}

func TestStopLeavesNothing(t *testing.T) {
	for _, tc := range []struct {
		name string
		end  func(*testruntime.Runtime)
	}{
		{"running", func(*testruntime.Runtime) {}},
		{"killed", (*testruntime.Runtime).Kill},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rt := testruntime.Start(t)
			c := dial(t, rt)
			_, inParent, _ := c.run(rt, "a", rt.Cgroup+"/a", []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: freePort(t)}}, "sleep", "1000000")
			_, inDefault, _ := c.run(rt, "b", "", nil, "sleep", "1000000")
			if left := fmt.Sprint(traces(t, rt, inDefault)); !strings.Contains(left, rt.Cgroup) || !strings.Contains(left, "k8s.io/"+inDefault) || !strings.Contains(left, inParent) {
				t.Fatalf("the test does not see all traces of running pods: %s", left)
			}
			tc.end(rt)
			if err := rt.Stop(); err != nil {
				t.Error(err)
			}
			if left := traces(t, rt, inParent, inDefault); len(left) > 0 {
				t.Errorf("left: %q", left)
			}
			if _, err := os.Stat(rt.Dir); !os.IsNotExist(err) {
				t.Errorf("folder %s: %v", rt.Dir, err)
			}
		})
	}
}

// TestOwnerKilled lets a process that owns a runtime die by kill -9.
func TestOwnerKilled(t *testing.T) {
	if os.Getenv("TESTRUNTIME_OWNER") != "" {
		rt := testruntime.Start(t)
		dial(t, rt).run(rt, "a", rt.Cgroup, []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: freePort(t)}}, "sleep", "1000000")
		fmt.Println("owns", rt.Dir, rt.Bridge, rt.Cgroup)
		select {}
	}
	if err := testruntime.Missing(); err != nil {
		t.Skip(err)
	}
	cmd := exec.Command(os.Args[0], "-test.run", "^TestOwnerKilled$")
	cmd.Env = append(os.Environ(), "TESTRUNTIME_OWNER=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	rt := &testruntime.Runtime{}
	_, err = fmt.Fscanf(out, "owns %s %s %s\n", &rt.Dir, &rt.Bridge, &rt.Cgroup)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is left", func() bool {
		_, err := os.Stat(rt.Dir)
		return os.IsNotExist(err) && len(traces(t, rt)) == 0
	})
}

func TestTwoAtOnce(t *testing.T) {
	a, b := testruntime.Start(t), testruntime.Start(t)
	ca, cb := dial(t, a), dial(t, b)
	_, ida, _ := ca.run(a, "same", a.Cgroup, nil, "sleep", "1000000")
	_, idb, _ := cb.run(b, "same", b.Cgroup, nil, "sleep", "1000000")
	if err := a.KillContainers(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the first runtime's container ends", func() bool { return ca.state(ida) == runtimeapi.ContainerState_CONTAINER_EXITED })
	if got := cb.state(idb); got != runtimeapi.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the other runtime's container is %s", got)
	}
}
