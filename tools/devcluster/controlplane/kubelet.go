package controlplane

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// KubeletOptions say what [RunKubelet] runs.
type KubeletOptions struct {
	// Cluster is the Dir of a running devcluster on this machine. Required.
	Cluster string
	// Dir is the folder of the kubelet's data, log and credentials, created if
	// missing. Required, and short: there are Unix sockets in it.
	Dir string
	// Node is the name under which it registers. Required.
	Node string
	// Runtime is the CRI socket, as unix:///path or a path. Required.
	Runtime string
	// CgroupRoot is the cgroup below which it keeps its pods; empty means /Node. It
	// is made if missing. A kubelet kills every pod cgroup that it does not know, so
	// two nodes on one machine may not share it.
	CgroupRoot string
	// Binary is a kubelet to run in place of this executable; empty for this one.
	Binary string
	// Taints are what the node registers with, each as key=value:effect or key:effect.
	Taints []string
	// Args are further flags; they win over what is set here.
	Args []string
	// Logger gets what a person should see; nil discards it.
	Logger *slog.Logger
	// Ready is called once, when the node is Ready. It must not block. May be nil.
	Ready func(KubeletReady)
}

// KubeletReady tells of a node that is Ready.
type KubeletReady struct {
	PID   int           // of the kubelet's process
	After time.Duration // from the call of RunKubelet
}

// Validate reports what cannot work, matching [ErrUsage].
func (o *KubeletOptions) Validate() error {
	for _, need := range []struct{ value, flag, what string }{
		{o.Cluster, "--cluster", "the folder of a running devcluster"},
		{o.Dir, "--dir", "a folder that the kubelet may fill"},
		{o.Node, "--node", "the node's name"},
		{o.Runtime, "--runtime", "the runtime's socket, such as unix:///run/containerd/containerd.sock"},
	} {
		if need.value == "" {
			return usagef("%s is missing; pass %s", need.flag, need.what)
		}
	}
	if os.Geteuid() != 0 {
		return usagef("a kubelet needs root: it mounts volumes and makes cgroups")
	}
	if path := strings.TrimPrefix(o.Runtime, "unix://"); !isSocket(path) {
		return usagef("%s is no socket; start the container runtime first", path)
	}
	return nil
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeSocket != 0
}

// RunKubelet runs the stock kubelet as a node of a devcluster until ctx ends,
// and then returns nil, or until it dies, and then returns why. Pods outlive it,
// as they do any kubelet: a second run on the same Dir finds them again.
func RunKubelet(ctx context.Context, opts KubeletOptions) (err error) {
	begin := time.Now()
	if err := opts.Validate(); err != nil {
		return err
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	cluster, err := filepath.Abs(opts.Cluster)
	if err != nil {
		return fmt.Errorf("absolute path of %q: %w", opts.Cluster, err)
	}
	dir, err := newFolder(opts.Dir)
	if err != nil {
		return err
	}
	lock, err := dir.lock(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	logPath := dir.path("log")
	logFile, err := openLog(logPath)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, logFile.Close()) }()

	client, err := dir.joinCluster(folder{cluster}, opts.Node, begin)
	if err != nil {
		return err
	}
	defer client.close()
	args, err := dir.kubeletArgs(opts)
	if err != nil {
		return err
	}
	opts.Logger.Info("starting a kubelet", "node", opts.Node, "dir", dir.root, "log", logPath)

	runtime.LockOSThread() // as in Run
	defer runtime.UnlockOSThread()
	kids := &children{logger: opts.Logger, log: logFile, logPath: logPath, workDir: dir.path("run"), lock: lock, binary: opts.Binary}
	defer func() { err = errors.Join(err, kids.stop()) }()
	if err := kids.start(Kubelet, args); err != nil {
		return err
	}
	startCtx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := kids.await(startCtx, "the node to be Ready", client.pollNode(opts.Node, begin)); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	if opts.Ready != nil {
		opts.Ready(KubeletReady{PID: kids.running[0].cmd.Process.Pid, After: time.Since(begin)})
	}
	if err := kids.await(ctx, "the end", nil); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// joinCluster writes the node's kubeconfig, with a certificate of the cluster's
// authority, and gives the administrator's client.
func (f folder) joinCluster(cluster folder, node string, now time.Time) (*adminClient, error) {
	config, err := os.ReadFile(cluster.path("kubeconfig"))
	if err != nil {
		return nil, usagef("no devcluster in %s (%v); start one with: devcluster run --dir %s", cluster.root, err, cluster.root)
	}
	var server string
	for line := range strings.Lines(string(config)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "server: "); ok {
			server = v
		}
	}
	ca, err := cluster.ensureAuthority("ca", "devcluster-ca", now)
	if err != nil {
		return nil, err
	}
	admin, err := cluster.readPair("admin")
	if err != nil {
		return nil, err
	}
	pair, err := cluster.ensureLeaf("node-"+node, ca, leaf{user: "system:node:" + node, groups: []string{"system:nodes"}, usage: x509.ExtKeyUsageClientAuth}, now)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		f.write(kubeconfig(server, ca.keyPair.cert, node, pair), "run", "kubeconfig"),
		f.write(ca.keyPair.cert, "pki", "ca.crt"),
	)
	if err != nil {
		return nil, err
	}
	return newAdminClient(server, &pki{caPEM: ca.keyPair.cert, admin: admin})
}

// kubeletArgs writes the configuration and gives the flags, for it has no place
// for some. What is set differs from the defaults only where this machine may be
// any: cgroup v1, swap, a disk that is nearly full, other kubelets beside it.
func (f folder) kubeletArgs(opts KubeletOptions) ([]string, error) {
	if opts.CgroupRoot == "" {
		opts.CgroupRoot = "/" + opts.Node
	}
	if err := makeCgroup(opts.CgroupRoot); err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	taints, err := parseTaints(opts.Taints)
	if err != nil {
		return nil, err
	}
	ip := net.IPv4(127, 0, 0, 1)
	if ips := hostIPs(); len(ips) > 0 {
		ip = ips[0] // what the node says, and so where the API server asks it
	}
	runtimeURL := opts.Runtime
	if !strings.Contains(runtimeURL, "://") {
		runtimeURL = "unix://" + runtimeURL
	}
	config := map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"containerRuntimeEndpoint": runtimeURL,
		"address":                  ip.String(),
		"port":                     port,
		"healthzPort":              0,
		"authentication": map[string]any{
			"anonymous": map[string]any{"enabled": false},
			"webhook":   map[string]any{"enabled": true},
			"x509":      map[string]any{"clientCAFile": f.path("pki", "ca.crt")},
		},
		"cgroupDriver":           "cgroupfs", // as containerd without SystemdCgroup
		"cgroupRoot":             opts.CgroupRoot,
		"failCgroupV1":           false,
		"failSwapOn":             false,
		"podLogsDir":             f.path("logs"),
		"volumePluginDir":        f.path("volume-plugins"),
		"staticPodPath":          f.path("static-pods"),
		"makeIPTablesUtilChains": false,
		"registerWithTaints":     taints,
		"evictionHard": map[string]string{
			"memory.available": "100Mi", "nodefs.available": "1%", "nodefs.inodesFree": "1%", "imagefs.available": "1%", "imagefs.inodesFree": "1%",
		},
		// Images come from archives: what is collected does not come back.
		"imageGCHighThresholdPercent": 100,
	}
	for _, d := range []string{"logs", "volume-plugins", "static-pods"} {
		if err := os.MkdirAll(f.path(d), 0o755); err != nil {
			return nil, fmt.Errorf("create folder: %w", err)
		}
	}
	b, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := f.write(append(b, '\n'), "run", "config.json"); err != nil {
		return nil, err
	}
	return append([]string{
		"--config=" + f.path("run", "config.json"),
		"--kubeconfig=" + f.path("run", "kubeconfig"),
		"--hostname-override=" + opts.Node,
		"--node-ip=" + ip.String(),
		"--root-dir=" + f.path("kubelet"),
		"--cert-dir=" + f.path("pki"),
	}, opts.Args...), nil
}

// makeCgroup makes a cgroup, in all hierarchies of v1 or in that of v2.
func makeCgroup(name string) error {
	const mount = "/sys/fs/cgroup"
	if _, err := os.Stat(filepath.Join(mount, "cgroup.controllers")); err == nil { // v2
		return mkCgroup(mount + name)
	}
	entries, err := os.ReadDir(mount)
	if err != nil {
		return fmt.Errorf("cgroups: %w", err)
	}
	for _, e := range entries {
		// Hierarchies of several controllers have links beside them, one for each.
		if !e.IsDir() || e.Name() == "unified" {
			continue
		}
		path := filepath.Join(mount, e.Name()) + name
		if err := mkCgroup(path); err != nil {
			return err
		}
		if _, err := os.Stat(filepath.Join(path, "cpuset.cpus")); err == nil {
			if err := inheritCpuset(filepath.Dir(path), path); err != nil {
				return err
			}
		}
	}
	return nil
}

func mkCgroup(path string) error {
	if err := os.MkdirAll(path, 0o755); err != nil {
		return fmt.Errorf("make the node's cgroup: %w", err)
	}
	return nil
}

// inheritCpuset gives a new cgroup of v1 the CPUs and memory of its parent: it
// starts with none, and can hold no process then.
func inheritCpuset(parent, child string) error {
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		b, err := os.ReadFile(filepath.Join(parent, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(child, name), b, 0o644)
		}
		if err != nil {
			return fmt.Errorf("CPUs of the node's cgroup: %w", err)
		}
	}
	return nil
}

func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("port of the kubelet: %w", err)
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

type taint struct {
	Key    string `json:"key"`
	Value  string `json:"value,omitempty"`
	Effect string `json:"effect"`
}

func parseTaints(list []string) ([]taint, error) {
	taints := []taint{}
	for _, s := range list {
		kv, effect, ok := strings.Cut(s, ":")
		if !ok || !slices.Contains([]string{"NoSchedule", "PreferNoSchedule", "NoExecute"}, effect) {
			return nil, usagef("taint %q: want key=value:effect or key:effect, with the effect NoSchedule, PreferNoSchedule or NoExecute", s)
		}
		key, value, _ := strings.Cut(kv, "=")
		taints = append(taints, taint{key, value, effect})
	}
	return taints, nil
}

// pollNode gives nil once the node says that it is Ready, and said so after since.
func (c *adminClient) pollNode(name string, since time.Time) <-chan error {
	since = since.Truncate(time.Second) // the resolution of what it says
	return c.pollUntil(func() bool {
		var node struct {
			Status struct {
				Conditions []struct {
					Type, Status      string
					LastHeartbeatTime time.Time
				}
			}
		}
		code, body := c.get("/api/v1/nodes/" + name)
		if code != http.StatusOK || json.Unmarshal(body, &node) != nil {
			return false
		}
		for _, cond := range node.Status.Conditions {
			if cond.Type == "Ready" {
				return cond.Status == "True" && !cond.LastHeartbeatTime.Before(since)
			}
		}
		return false
	})
}
