package stack

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/fairlead-io/fairlead/schemas/crd"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// Config says where the programs and the data are.
type Config struct {
	// Bin holds the binaries that `go tool task build` makes.
	Bin string
	// Dir is the folder for data and logs; it is created.
	Dir string
	// Repo is the repository's root, for the manifests of deploy/.
	Repo string
	// Kubeconfig names a running cluster; empty starts the development control plane.
	Kubeconfig string
}

// Stack is a set of running parts.
type Stack struct {
	Config
	Cluster *Process // nil for a cluster of somebody else's
	Cloud   *Process

	// CloudMQTT and CloudLocal are the cloud broker's listeners: the nodes' and
	// the operator's.
	CloudMQTT, CloudLocal string
	// CloudMetrics is the address of the cloud's /metrics.
	CloudMetrics string

	parts    []*Process
	runtimes []*testruntime.Runtime
}

// Edge is a running edge node.
type Edge struct {
	*Process
	Node string
	// Bus is the node's MQTT address, host:port or unix:///path.
	Bus     string
	Dir     string
	Metrics string
	// Runtime is where its pods run, see [Stack.StartPodEdge]; nil for a node
	// without pods.
	Runtime *testruntime.Runtime
	// Enter moves the calling thread to where the node's programs are to run, such
	// as a network namespace; nil leaves them here. Bus is a unix:// one there.
	Enter func() error
}

// startTimeout bounds the start of one part.
const startTimeout = 2 * time.Minute

// New checks that the binaries are there.
func New(c Config) (*Stack, error) {
	var err error
	if c.Bin, err = filepath.Abs(c.Bin); err != nil {
		return nil, err
	}
	if c.Dir, err = filepath.Abs(c.Dir); err != nil {
		return nil, err
	}
	var missing []string
	for _, b := range []string{"fairlead-cloud", "fairlead-edge", "fairlead-mapper", "fairlead", "kubectl", "devcluster"} {
		if _, err := os.Stat(filepath.Join(c.Bin, b)); err != nil {
			missing = append(missing, b)
		}
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("missing in %s: %s; build them with `go tool task build`", c.Bin, strings.Join(missing, ", "))
	}
	if err := os.MkdirAll(filepath.Join(c.Dir, "log"), 0o700); err != nil {
		return nil, err
	}
	s := &Stack{Config: c}
	ports := make([]int, 3)
	for i := range ports {
		if ports[i], err = FreePort(); err != nil {
			return nil, err
		}
	}
	s.CloudMQTT = fmt.Sprintf("127.0.0.1:%d", ports[0])
	s.CloudLocal = fmt.Sprintf("127.0.0.1:%d", ports[1])
	s.CloudMetrics = fmt.Sprintf("127.0.0.1:%d", ports[2])
	return s, nil
}

func (s *Stack) bin(name string) string { return filepath.Join(s.Bin, name) }

func (s *Stack) log() string { return filepath.Join(s.Dir, "log") }

func (s *Stack) start(ctx context.Context, name, program string, args []string, ready func(string) bool) (*Process, error) {
	return s.startIn(ctx, nil, name, program, args, ready)
}

func (s *Stack) startIn(ctx context.Context, enter func() error, name, program string, args []string, ready func(string) bool) (*Process, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	p, err := start(ctx, enter, s.log(), name, s.bin(program), args, ready)
	if err != nil {
		return nil, err
	}
	s.parts = append(s.parts, p)
	return p, nil
}

// StartCluster starts the development control plane, unless a cluster was
// named, and applies the CRDs and policies.
func (s *Stack) StartCluster(ctx context.Context) error {
	if s.Kubeconfig == "" || s.Cluster != nil {
		p, err := s.start(ctx, "devcluster", "devcluster", []string{"run", "--dir", filepath.Join(s.Dir, "cluster"), "--stop-on-stdin-close"}, func(line string) bool {
			for _, f := range strings.Fields(line) {
				if v, ok := strings.CutPrefix(f, "kubeconfig="); ok {
					s.Kubeconfig = v
				}
			}
			return strings.HasPrefix(line, "ready ")
		})
		if err != nil {
			return err
		}
		s.Cluster = p
	}
	for _, m := range crd.All() {
		if _, err := s.KubectlIn(ctx, m.YAML, "apply", "--server-side", "-f", "-"); err != nil {
			return fmt.Errorf("apply the CRDs: %w", err)
		}
	}
	if _, err := s.Kubectl(ctx, "wait", "--for=condition=Established", "crd/devices.fairlead.dev", "crd/devicemodels.fairlead.dev", "--timeout=60s"); err != nil {
		return err
	}
	if _, err := s.Kubectl(ctx, append([]string{"apply", "--server-side"}, s.policies()...)...); err != nil {
		return fmt.Errorf("apply the policies: %w", err)
	}
	return s.waitPolicies(ctx)
}

// DropPolicies takes the policies out of the cluster; StartCluster brings them back.
func (s *Stack) DropPolicies(ctx context.Context) error {
	_, err := s.Kubectl(ctx, append([]string{"delete", "--ignore-not-found", "--wait=false", "--request-timeout=5s"}, s.policies()...)...)
	return err
}

func (s *Stack) policies() []string {
	dir := filepath.Join(s.Repo, "deploy", "cloud")
	return []string{"-f", filepath.Join(dir, "policies.yaml"), "-f", filepath.Join(dir, "policies-pods.yaml")}
}

// probe is a Device that nobody creates.
const probe = `{"apiVersion":"fairlead.dev/v1alpha1","kind":"Device","metadata":{"generateName":"probe-","namespace":"default"},` +
	`"spec":{"nodeName":"probe","model":"probe","modbus":{"address":"127.0.0.1:502"}}}`

// waitPolicies waits until the API server can evaluate the policies. One that
// starts with them may not know the kinds yet that they refer to, and refuses
// every Device until it looks again, 30 s later (DeferredDiscoveryRESTMapper in
// k8s.io/apiserver/pkg/server/options/admission.go). [Stack.DropPolicies] before
// the end spares the next start that.
func (s *Stack) waitPolicies(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		_, err := s.KubectlIn(ctx, []byte(probe), "create", "--dry-run=server", "-f", "-")
		if err == nil || !strings.Contains(err.Error(), "failed to configure policy") {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// StartCloud starts fairlead-cloud and waits until it is ready. Extra arguments
// go to its command line.
func (s *Stack) StartCloud(ctx context.Context, extra ...string) error {
	args := append([]string{
		"run", "--kubeconfig", s.Kubeconfig, "--data", filepath.Join(s.Dir, "cloud"),
		"--mqtt", s.CloudMQTT, "--local", s.CloudLocal, "--metrics", s.CloudMetrics,
	}, extra...)
	p, err := s.start(ctx, "fairlead-cloud", "fairlead-cloud", args, nil)
	if err != nil {
		return err
	}
	s.Cloud = p
	return waitTCP(ctx, p, s.CloudLocal)
}

// StartBridge starts fairlead-cloud on somebody else's broker. It has no
// listener of its own then but for its metrics.
func (s *Stack) StartBridge(ctx context.Context, broker string, extra ...string) error {
	args := append([]string{"run", "--kubeconfig", s.Kubeconfig, "--broker", broker, "--metrics", s.CloudMetrics}, extra...)
	p, err := s.start(ctx, "fairlead-cloud", "fairlead-cloud", args, nil)
	if err != nil {
		return err
	}
	s.Cloud = p
	return waitTCP(ctx, p, s.CloudMetrics)
}

// StartProgram starts a program that is not ours, and waits until it accepts
// connections at addr.
func (s *Stack) StartProgram(ctx context.Context, name, path, addr string, args ...string) (*Process, error) {
	p, err := start(ctx, nil, s.log(), name, path, args, nil)
	if err != nil {
		return nil, err
	}
	s.parts = append(s.parts, p)
	return p, waitTCP(ctx, p, addr)
}

// Token makes a node's credential and writes it to a file, whose path it gives.
// A node that has one already gets a new one.
func (s *Stack) Token(ctx context.Context, node string) (string, error) {
	out, err := s.Run(ctx, "fairlead", "token", "create", "--kubeconfig", s.Kubeconfig, "--node", node, "--force")
	if err != nil {
		return "", err
	}
	path := filepath.Join(s.Dir, node+".token")
	return path, os.WriteFile(path, out, 0o600)
}

// StartEdge starts a node's agent, joined to the cloud, and waits until its bus
// serves. The second start of the same node keeps its data and its port.
func (s *Stack) StartEdge(ctx context.Context, e *Edge, extra ...string) (*Edge, error) {
	if e.Bus == "" {
		port, err := FreePort()
		if err != nil {
			return nil, err
		}
		mport, err := FreePort()
		if err != nil {
			return nil, err
		}
		e.Bus, e.Metrics = fmt.Sprintf("127.0.0.1:%d", port), fmt.Sprintf("127.0.0.1:%d", mport)
		if e.Dir == "" {
			e.Dir = filepath.Join(s.Dir, "edge-"+e.Node)
		}
	}
	token := filepath.Join(s.Dir, e.Node+".token")
	if _, err := os.Stat(token); err != nil {
		if _, err := s.Token(ctx, e.Node); err != nil {
			return nil, err
		}
	}
	args := append([]string{
		"run", "--node", e.Node, "--data", e.Dir, "--mqtt", e.Bus, "--metrics", e.Metrics,
		"--cloud", "mqtt://" + s.CloudMQTT, "--token-file", token,
	}, extra...)
	p, err := s.startIn(ctx, e.Enter, "fairlead-edge-"+e.Node, "fairlead-edge", args, nil)
	if err != nil {
		return nil, err
	}
	e.Process = p
	return e, waitTCP(ctx, p, e.Bus)
}

// StartMapper starts a Modbus mapper on a node's bus.
func (s *Stack) StartMapper(ctx context.Context, e *Edge, extra ...string) (*Process, error) {
	bus := e.Bus
	if !strings.Contains(bus, "://") {
		bus = "mqtt://" + bus
	}
	args := append([]string{
		"run", "--bus", bus, "--node", e.Node, "--name", "modbus",
		"--token-file", filepath.Join(e.Dir, "mapper.token"), "--protocol", "modbus",
	}, extra...)
	return s.startIn(ctx, e.Enter, "fairlead-mapper-"+e.Node, "fairlead-mapper", args, nil)
}

// StartTool starts any other program of Bin and waits for a line of its
// standard output that begins with ready; it gives the rest of that line.
func (s *Stack) StartTool(ctx context.Context, name, ready string, args ...string) (*Process, string, error) {
	var rest string
	p, err := s.start(ctx, name, name, args, func(line string) bool {
		r, ok := strings.CutPrefix(line, ready)
		if ok {
			rest = strings.TrimSpace(r)
		}
		return ok
	})
	return p, rest, err
}

// Kubectl runs the built kubectl on the cluster and gives its output.
func (s *Stack) Kubectl(ctx context.Context, args ...string) ([]byte, error) {
	return s.KubectlIn(ctx, nil, args...)
}

// KubectlIn is Kubectl with a standard input.
func (s *Stack) KubectlIn(ctx context.Context, in []byte, args ...string) ([]byte, error) {
	return s.run(ctx, in, "kubectl", append([]string{"--kubeconfig", s.Kubeconfig}, args...)...)
}

// Run runs a program of Bin to its end and gives its standard output.
func (s *Stack) Run(ctx context.Context, program string, args ...string) ([]byte, error) {
	return s.run(ctx, nil, program, args...)
}

func (s *Stack) run(ctx context.Context, in []byte, program string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, s.bin(program), args...)
	var errOut bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(in), &errOut
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), err, bytes.TrimSpace(errOut.Bytes()))
	}
	return out, nil
}

// Stop stops every part, the newest first.
func (s *Stack) Stop() {
	for i := len(s.parts) - 1; i >= 0; i-- {
		s.parts[i].Stop()
	}
	s.parts = nil
	s.stopRuntimes()
}

// waitTCP waits until the part accepts connections.
func waitTCP(ctx context.Context, p *Process, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	network := "tcp"
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		network, addr = "unix", path
	}
	for {
		c, err := net.DialTimeout(network, addr, time.Second)
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.Done():
			return fmt.Errorf("%s ended before it was ready: %w\n%s", p.Name, p.exit(), p.Tail(15))
		case <-ctx.Done():
			return errors.Join(ctx.Err(), fmt.Errorf("%s does not answer at %s: %w\n%s", p.Name, addr, err, p.Tail(15)))
		case <-time.After(20 * time.Millisecond):
		}
	}
}
