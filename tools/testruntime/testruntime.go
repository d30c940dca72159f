package testruntime

import (
	"bytes"
	"context"
	"debug/elf"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ErrMissing is wrapped by the error of [New] where containers cannot run on
// this machine for want of a package or of rights.
var ErrMissing = errors.New("no containers on this machine")

// cniPlugins is where Debian's containernetworking-plugins are.
const cniPlugins = "/usr/lib/cni"

// patience is how long containerd has to serve; seconds on a busy machine.
const patience = 60 * time.Second

//go:embed cleanup.sh
var cleanup string

// Runtime is a containerd of its own. Its methods may be called from several
// goroutines.
type Runtime struct {
	Socket string // unix:///…/containerd.sock: the CRI's and containerd's own
	Dir    string // its folder: config.toml, containerd.log, root, state, cni, …
	// Cgroup is the cgroup that pods of this runtime belong below, such as
	// /fairlead-test-7; it is made by whoever uses it and removed with the runtime.
	Cgroup string
	// Bridge is the network's device and name, Subnet the pods'. The host is its
	// first address.
	Bridge string
	Subnet net.IPNet

	watch *exec.Cmd // cleanup.sh watch
	alive io.Closer // its standard input

	mu struct {
		sync.Mutex
		cmd     *exec.Cmd     // nil while containerd does not run
		exited  chan struct{} // closed once cmd has been waited for
		stopped bool
	}
}

// Start runs a runtime until the test ends. The test is skipped where containers
// cannot run.
func Start(t testing.TB) *Runtime {
	t.Helper()
	dir, err := os.MkdirTemp("", "flr") //nolint:usetesting // the path of a unix socket has 107 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	r, err := New(dir)
	if errors.Is(err, ErrMissing) {
		_ = os.Remove(dir) // it is empty
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of containerd's log:\n%s", r.Log(20))
		}
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// Missing says what keeps containers from running on this machine; nil where
// they do. The error wraps ErrMissing.
func Missing() error {
	var lack []string
	for _, p := range []struct{ file, pkg string }{
		{"containerd", "containerd"}, {"containerd-shim-runc-v2", "containerd"}, {"ctr", "containerd"}, {"runc", "runc"},
		{cniPlugins + "/bridge", "containernetworking-plugins"}, {busybox, "busybox-static"},
	} {
		_, err := exec.LookPath(p.file)
		if p.file == busybox && err == nil {
			err = static(busybox)
		}
		if err != nil && !slices.Contains(lack, p.pkg) {
			lack = append(lack, p.pkg)
		}
	}
	switch {
	case len(lack) > 0:
		return fmt.Errorf("%w: apt-get install %s", ErrMissing, strings.Join(lack, " "))
	case os.Geteuid() != 0:
		return fmt.Errorf("%w: containerd wants root", ErrMissing)
	}
	return nil
}

// static says whether a program runs without libraries, as in an image it must.
func static(program string) error {
	f, err := elf.Open(program)
	if err != nil {
		return err
	}
	defer f.Close()
	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return errors.New("it is linked dynamically")
	}
	return nil
}

var plainPath = regexp.MustCompile(`^/[A-Za-z0-9/._-]+$`)

// New runs a runtime in a folder, which it makes and Stop removes with all that
// is in it.
func New(dir string) (*Runtime, error) {
	if err := Missing(); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	r := &Runtime{Dir: dir, Socket: "unix://" + filepath.Join(dir, "containerd.sock")}
	if n := len(dir + "/containerd.sock.ttrpc"); n > 107 || !plainPath.MatchString(dir) {
		return nil, fmt.Errorf("testruntime: folder %s: want letters, digits, '.', '_' and '-' only, and 85 bytes at most, for it holds a unix socket", dir)
	}
	if err := os.MkdirAll(filepath.Join(dir, "cni"), 0o755); err != nil {
		return nil, err
	}
	if err := r.takeBridge(); err != nil {
		return nil, err
	}
	r.Cgroup = "/fairlead-test-" + strings.TrimPrefix(r.Bridge, "flt")
	if err := r.guard(); err != nil {
		return nil, err
	}
	if err := r.start(); err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	return r, nil
}

// takeBridge makes the network's device. Its number is the subnet's, so making
// it also takes the subnet, against other processes too.
func (r *Runtime) takeBridge() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("testruntime: %w", err)
	}
	defer unix.Close(s)
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("testruntime: %w", err)
	}
next:
	for n := range 256 {
		subnet := net.IPNet{IP: net.IPv4(10, 87, byte(n), 0), Mask: net.CIDRMask(24, 32)}
		for _, a := range addrs {
			if a, ok := a.(*net.IPNet); ok && (subnet.Contains(a.IP) || a.Contains(subnet.IP)) {
				continue next
			}
		}
		var name [unix.IFNAMSIZ]byte
		copy(name[:], fmt.Sprintf("flt%d", n))
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(s), unix.SIOCBRADDBR, uintptr(unsafe.Pointer(&name)))
		if errno == unix.EEXIST {
			continue
		}
		if errno != 0 {
			return fmt.Errorf("testruntime: %w: make a network bridge: %w", ErrMissing, errno)
		}
		r.Bridge, r.Subnet = fmt.Sprintf("flt%d", n), subnet
		return nil
	}
	return errors.New("testruntime: all subnets of 10.87.0.0/16 are taken: remove unused bridges, such as with: ip link del flt0")
}

// guard starts the process that cleans up once this one has stopped or died.
func (r *Runtime) guard() error {
	cmd := r.cleanup("watch")
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	// Ctrl-C is for the owner.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	r.watch, r.alive = cmd, in
	return nil
}

func (r *Runtime) cleanup(verb string) *exec.Cmd {
	cmd := exec.Command("/bin/sh", "-c", cleanup, "cleanup.sh", verb, r.Dir, r.Bridge, r.Cgroup)
	cmd.Stderr = os.Stderr
	return cmd
}

func (r *Runtime) start() error {
	gateway := net.IPv4(10, 87, r.Subnet.IP.To4()[2], 1)
	for name, text := range map[string]string{
		"config.toml": fmt.Sprintf(`version = 2
root = "%[1]s/root"
state = "%[1]s/state"
[grpc]
  address = "%[1]s/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "%[1]s/opt"
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true # else runc fails where CAP_SYS_RESOURCE is missing
  sandbox_image = "%[3]s"
  netns_mounts_under_state_dir = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "%[2]s"
    conf_dir = "%[1]s/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "%[1]s/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "%[1]s/runc"
`, r.Dir, cniPlugins, Pause),
		"cni/10-test.conflist": fmt.Sprintf(`{
  "cniVersion": "0.4.0",
  "name": "%[1]s",
  "plugins": [
    {
      "type": "bridge", "bridge": "%[1]s", "isGateway": true, "hairpinMode": true, "ipMasq": false,
      "ipam": {
        "type": "host-local", "dataDir": "%[2]s/ipam",
        "ranges": [[{"subnet": "%[3]s", "gateway": "%[4]s"}]],
        "routes": [{"dst": "0.0.0.0/0"}]
      }
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`, r.Bridge, r.Dir, r.Subnet.String(), gateway),
	} {
		if err := os.WriteFile(filepath.Join(r.Dir, name), []byte(text), 0o600); err != nil {
			return err
		}
	}
	if err := r.Restart(); err != nil {
		return err
	}
	archives, err := standard()
	if err != nil {
		return err
	}
	for _, a := range archives {
		if err := r.Import(a); err != nil {
			return err
		}
	}
	return nil
}

// Import puts an image archive into the runtime, with containerd's own tool.
func (r *Runtime) Import(archive []byte) error {
	cmd := exec.Command("ctr", "--address", strings.TrimPrefix(r.Socket, "unix://"), "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("testruntime: ctr images import: %w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// Registry makes the runtime pull images of a host, such as fairlead.test, from
// a registry at url, such as http://127.0.0.1:5000.
func (r *Runtime) Registry(host, url string) error {
	dir := filepath.Join(r.Dir, "certs.d", host)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\", \"resolve\"]\n", url, url)
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), []byte(text), 0o600)
}

// Kill ends containerd at once. Containers and their shims live on.
func (r *Runtime) Kill() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.killLocked()
}

func (r *Runtime) killLocked() {
	if r.mu.cmd == nil {
		return
	}
	_ = r.mu.cmd.Process.Kill() // it may have ended by itself
	<-r.mu.exited
	r.mu.cmd = nil
}

// Restart runs containerd again, killing it first if it runs, and waits until it
// serves with its network ready.
func (r *Runtime) Restart() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.killLocked()
	log, err := os.OpenFile(filepath.Join(r.Dir, "containerd.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own
	cmd := exec.Command("containerd", "--config", filepath.Join(r.Dir, "config.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("testruntime: %w", err)
	}
	exited := make(chan struct{})
	go func() { defer close(exited); _ = cmd.Wait() }() // how it ended is in its log
	r.mu.cmd, r.mu.exited = cmd, exited
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := r.ready(ctx, exited); err != nil {
		return fmt.Errorf("testruntime: containerd does not serve: %w\n%s", err, r.Log(20))
	}
	return nil
}

// dial connects to the CRI.
func (r *Runtime) dial() (*grpc.ClientConn, error) {
	return grpc.NewClient(r.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

// ready waits until the runtime and its network are.
func (r *Runtime) ready(ctx context.Context, exited <-chan struct{}) error {
	path := strings.TrimPrefix(r.Socket, "unix://")
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var conn *grpc.ClientConn
	defer func() {
		if conn != nil {
			conn.Close()
		}
	}()
	var last error
	for {
		select {
		case <-exited:
			return errors.New("it ended by itself")
		case <-ctx.Done():
			return errors.Join(ctx.Err(), last)
		case <-tick.C:
		}
		if conn == nil {
			// grpc would wait a second before it tries again.
			c, err := net.Dial("unix", path)
			if err != nil {
				last = err
				continue
			}
			c.Close()
			if conn, err = r.dial(); err != nil {
				return err
			}
		}
		s, err := runtimeapi.NewRuntimeServiceClient(conn).Status(ctx, &runtimeapi.StatusRequest{}, grpc.WaitForReady(true))
		if last = err; err != nil {
			continue
		}
		for _, c := range s.Status.Conditions {
			if !c.Status && (c.Type == runtimeapi.RuntimeReady || c.Type == runtimeapi.NetworkReady) {
				last = fmt.Errorf("%s: %s: %s", c.Type, c.Reason, c.Message)
			}
		}
		if last == nil {
			return nil
		}
	}
}

// KillContainers kills all containers and their shims with SIGKILL. containerd
// lives on, if it runs.
func (r *Runtime) KillContainers() error { return r.cleanup("kill").Run() }

// PowerCut ends containerd and all containers as a power cut would: what is
// below Dir/root stays, with the addresses in use; processes, mounts, network
// namespaces and the state folder are gone. Restart is the boot.
func (r *Runtime) PowerCut() error {
	r.Kill()
	return r.cleanup("powercut").Run()
}

// Log gives the last lines of containerd's log.
func (r *Runtime) Log(lines int) string {
	b, err := os.ReadFile(filepath.Join(r.Dir, "containerd.log"))
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Stop ends the runtime and removes whatever it has left: containers, sandboxes,
// mounts, network, cgroups and Dir. Once more does nothing.
func (r *Runtime) Stop() error {
	r.mu.Lock()
	running, stopped := r.mu.cmd != nil, r.mu.stopped
	r.mu.stopped = true
	r.mu.Unlock()
	if stopped {
		return nil
	}
	var err error
	if running {
		// In good order, the network plugins take their firewall rules along.
		err = r.removeSandboxes()
	}
	_ = r.alive.Close()
	if werr := r.watch.Wait(); werr != nil {
		err = errors.Join(err, fmt.Errorf("testruntime: cleanup: %w", werr))
	}
	r.Kill() // the guard has; this waits for it
	return err
}

func (r *Runtime) removeSandboxes() error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	conn, err := r.dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	c := runtimeapi.NewRuntimeServiceClient(conn)
	l, err := c.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil //nolint:nilerr // it was killed, or never served: the guard does it the hard way
	}
	var all sync.WaitGroup
	for _, s := range l.Items {
		all.Go(func() {
			_, _ = c.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.Id})     // as above
			_, _ = c.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: s.Id}) // as above
		})
	}
	all.Wait()
	return nil
}
