package pods

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/fairlead-io/fairlead/tools/stack"
	"github.com/fairlead-io/fairlead/tools/testregistry"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// patience is how long a test waits for what must come. It is no measurement:
// the machine may be busy, and the kubelet looks at some things once a minute.
const patience = 3 * time.Minute

var twice = flag.Bool("twice", false, "compare the kubelet with itself, to see how steady the comparison is")

// fab is the control plane and the cloud, kube its client, stock and agent the
// two nodes.
var (
	fab          *stack.Stack
	kube         kubernetes.Interface
	stock, agent *node
)

// node is one of the two nodes.
type node struct {
	name string
	rt   *testruntime.Runtime
	// data are the folders in which the node's program keeps what is in messages.
	data       string
	staticPods string
	edge       *stack.Edge // nil for a kubelet
}

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	bin := os.Getenv("FAIRLEAD_BIN")
	if bin == "" {
		fmt.Println("SKIP tests of pods: FAIRLEAD_BIN is not set; `go tool task test:e2e` builds the binaries and sets it")
		return 0
	}
	if err := testruntime.Missing(); err != nil {
		fmt.Println("SKIP tests of pods:", err)
		return 0
	}
	dir, err := os.MkdirTemp("", "fairlead-pods-")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	keep := false
	defer func() {
		if keep || os.Getenv("FAIRLEAD_E2E_KEEP") != "" {
			fmt.Println("logs and data are kept in", dir)
			return
		}
		_ = os.RemoveAll(dir)
	}()
	repo, err := filepath.Abs("../../..")
	if err != nil {
		fmt.Println(err)
		return 1
	}
	if fab, err = stack.New(stack.Config{Bin: bin, Dir: dir, Repo: repo}); err != nil {
		fmt.Println(err)
		return 1
	}
	defer fab.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := start(ctx); errors.Is(err, testruntime.ErrMissing) {
		fmt.Println("SKIP tests of pods:", err)
		return 0
	} else if err != nil {
		fmt.Println(err)
		keep = true
		return 1
	}
	// Those that run side by side wait most of the time.
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		if err := flag.Set("test.parallel", "12"); err != nil {
			fmt.Println(err)
			return 1
		}
	}
	code := m.Run()
	registry.Close()
	keep = code != 0
	return code
}

// start starts all parts.
func start(ctx context.Context) error {
	began := time.Now()
	if err := fab.StartCluster(ctx); err != nil {
		return err
	}
	config, err := clientcmd.BuildConfigFromFlags("", fab.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS, config.Burst = 200, 400
	config.WarningHandler = rest.NoWarnings{}
	if kube, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if err = startRegistry(); err != nil {
		return err
	}
	if stock, err = startKubelet(ctx, "pods-stock"); err != nil {
		return err
	}
	if *twice {
		agent, err = startKubelet(ctx, "pods-stock-2")
		return err
	}
	if err := fab.StartCloud(ctx); err != nil {
		return err
	}
	if agent, err = startAgent(ctx, "pods-edge"); err != nil {
		return err
	}
	fmt.Printf("control plane, cloud, kubelet and agent are up after %s\n", time.Since(began).Round(100*time.Millisecond))
	return nil
}

// registry is fairlead.test to both nodes. The image of a scenario that pulls has
// the scenario's name, so that it is on no node yet.
var registry *testregistry.Registry

var pulled = []string{"pull", "pull-always", "pull-private", "pull-forbidden", "image-change"}

func startRegistry() (err error) {
	if registry, err = testregistry.New(); err != nil {
		return err
	}
	files, err := testruntime.BusyboxFiles()
	if err != nil {
		return err
	}
	for _, name := range pulled {
		archive, err := testruntime.Image("fairlead.test/"+name+":1", files, testruntime.Config{
			Env: []string{"PATH=/bin"}, Labels: map[string]string{"name": name}, // else all are the same image
		})
		if err != nil {
			return err
		}
		if _, err := registry.Push(archive); err != nil {
			return err
		}
	}
	registry.Private("pull-private", "user", "password")
	registry.Private("pull-forbidden", "user", "password")
	return nil
}

// newRuntime is a runtime that knows the registry.
func newRuntime() (*testruntime.Runtime, error) {
	rt, err := fab.NewRuntime()
	if err != nil {
		return nil, err
	}
	return rt, rt.Registry("fairlead.test", registry.URL)
}

// serviceIP stands for a cluster's DNS, which there is not.
const serviceIP = "10.96.0.10"

func startKubelet(ctx context.Context, name string) (*node, error) {
	rt, err := newRuntime()
	if err != nil {
		return nil, err
	}
	k, err := fab.StartKubelet(ctx, &stack.Kubelet{Node: name, Runtime: rt}, "--kubelet-arg=--cluster-dns="+serviceIP, "--kubelet-arg=--cluster-domain=cluster.local")
	if err != nil {
		return nil, err
	}
	return &node{name: name, rt: rt, data: filepath.Join(k.Dir, "kubelet"), staticPods: k.StaticPods()}, nil
}

// agentArgs are of the agent's command line.
var agentArgs = []string{"--cluster-dns", serviceIP}

// startAgent starts an edge node and waits until Kubernetes has it as Ready.
func startAgent(ctx context.Context, name string) (*node, error) {
	rt, err := newRuntime()
	if err != nil {
		return nil, err
	}
	e, err := fab.StartPodEdge(ctx, &stack.Edge{Node: name, Runtime: rt}, agentArgs...)
	if err != nil {
		return nil, err
	}
	n := &node{name: name, rt: rt, data: e.Dir, staticPods: e.StaticPods(), edge: e}
	return n, n.waitReady(ctx)
}
