package stack

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// NewRuntime starts a container runtime that lives as long as the stack. Each
// node needs one of its own. The error wraps [testruntime.ErrMissing] where
// containers cannot run.
func (s *Stack) NewRuntime() (*testruntime.Runtime, error) {
	// Not below s.Dir: the path of a socket in it has 107 bytes at most.
	dir, err := os.MkdirTemp("", "flr")
	if err != nil {
		return nil, err
	}
	rt, err := testruntime.New(dir)
	if err != nil {
		_ = os.Remove(dir) // empty where nothing was started
		return nil, err
	}
	s.runtimes = append(s.runtimes, rt)
	return rt, nil
}

func (s *Stack) stopRuntimes() {
	for _, rt := range s.runtimes {
		if err := rt.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	if len(s.runtimes) > 0 {
		unmountBelow(s.Dir)
	}
	s.runtimes = nil
}

// StartPodEdge starts a node's agent that runs pods in e.Runtime. Its data are in
// the runtime's folder, which unmounts what is mounted there at the end.
func (s *Stack) StartPodEdge(ctx context.Context, e *Edge, extra ...string) (*Edge, error) {
	e.Dir = filepath.Join(e.Runtime.Dir, "edge")
	if err := os.MkdirAll(e.StaticPods(), 0o755); err != nil {
		return nil, err
	}
	return s.StartEdge(ctx, e, append([]string{
		"--runtime", e.Runtime.Socket, "--cgroup-root", e.Runtime.Cgroup, "--pod-logs", filepath.Join(e.Runtime.Dir, "logs"),
		"--static-pods", e.StaticPods(),
		// As the stock kubelet's in devcluster: the disk of a developer is often full.
		"--eviction-hard", "memory.available=100Mi,nodefs.available=1%,nodefs.inodesFree=1%,imagefs.available=1%,imagefs.inodesFree=1%",
	}, extra...)...)
}

// unmountBelow takes down what pods left mounted in a node's data folder: the
// agent leaves it, as pods outlive the agent.
func unmountBelow(dir string) {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return // there are none, or nothing can be done about them
	}
	for i := len(mounts) - 1; i >= 0; i-- { // the newest lies on top
		_ = unix.Unmount(mounts[i].Mountpoint, unix.MNT_DETACH)
	}
}

// StaticPods is the folder of the node's static pods.
func (e *Edge) StaticPods() string { return filepath.Join(e.Runtime.Dir, "static-pods") }

// ImageFolder is the folder from which the node imports archives of images.
func (e *Edge) ImageFolder() string { return filepath.Join(e.Dir, "images") }

// Kubelet is a running node with the stock kubelet.
type Kubelet struct {
	*Process // devcluster kubelet, which takes the kubelet with it
	Node     string
	Dir      string
	Runtime  *testruntime.Runtime
	// KubeletPID is the kubelet's own process.
	KubeletPID int
	// Binary is a kubelet to run in place of devcluster's; empty for that one.
	Binary string
}

// StaticPods is the folder of the node's static pods.
func (k *Kubelet) StaticPods() string { return filepath.Join(k.Dir, "static-pods") }

// StartKubelet starts the stock kubelet as a node of the development control
// plane, and waits until it is Ready. Pods outlive it; a second start finds them
// again. Extra arguments go to the command line of devcluster kubelet.
func (s *Stack) StartKubelet(ctx context.Context, k *Kubelet, extra ...string) (*Kubelet, error) {
	if s.Cluster == nil {
		return nil, fmt.Errorf("kubelet %s: only the development control plane can have one", k.Node)
	}
	k.Dir = filepath.Join(k.Runtime.Dir, "kl")
	args := []string{
		"kubelet", "--cluster", filepath.Join(s.Dir, "cluster"), "--dir", k.Dir, "--node", k.Node,
		"--runtime", k.Runtime.Socket, "--cgroup-root", k.Runtime.Cgroup, "--stop-on-stdin-close",
	}
	if k.Binary != "" {
		args = append(args, "--binary", k.Binary)
	}
	p, err := s.start(ctx, "kubelet-"+k.Node, "devcluster", append(args, extra...), func(line string) bool {
		for _, f := range strings.Fields(line) {
			if v, ok := strings.CutPrefix(f, "pid="); ok {
				k.KubeletPID, _ = strconv.Atoi(v)
			}
		}
		return strings.HasPrefix(line, "ready ")
	})
	if err != nil {
		return nil, err
	}
	k.Process = p
	return k, nil
}

// Containers are a runtime's containers, running or not, as its CRI socket says.
func Containers(ctx context.Context, rt *testruntime.Runtime) ([]*runtimeapi.Container, error) {
	conn, err := grpc.NewClient(rt.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	l, err := runtimeapi.NewRuntimeServiceClient(conn).ListContainers(ctx, &runtimeapi.ListContainersRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the containers of %s: %w", rt.Socket, err)
	}
	return l.Containers, nil
}

// Sandboxes are a runtime's pod sandboxes, ready or not.
func Sandboxes(ctx context.Context, rt *testruntime.Runtime) ([]*runtimeapi.PodSandbox, error) {
	conn, err := grpc.NewClient(rt.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	l, err := runtimeapi.NewRuntimeServiceClient(conn).ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, fmt.Errorf("list the sandboxes of %s: %w", rt.Socket, err)
	}
	return l.Items, nil
}
