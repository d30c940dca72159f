package server_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// deadline bounds every wait of these tests. It is generous: it only ends a
// test that has failed.
const deadline = 60 * time.Second

func TestMain(m *testing.M) {
	before := goleak.IgnoreCurrent()
	code := m.Run()
	if shared.c != nil {
		shared.c.stop() // and with it the clients' idle connections
	}
	if code == 0 {
		if err := goleak.Find(before); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// shared is the one control plane of the package's tests.
var shared struct {
	once sync.Once
	c    *cluster
	skip string
	err  error
}

// cluster is a real control plane.
type cluster struct {
	binary, dir, kubeconfig string

	cmd   *exec.Cmd
	stdin io.Closer
	rest  *rest.Config
	kube  kubernetes.Interface
	dyn   dynamic.Interface
	// limited is a kubeconfig with the rights of deploy/cloud/rbac.yaml alone.
	limited string
}

// control gives the control plane, or skips the test where there is none.
func control(t *testing.T) *cluster {
	t.Helper()
	shared.once.Do(func() {
		bin := os.Getenv("FAIRLEAD_DEVCLUSTER")
		if bin == "" {
			bin, _ = filepath.Abs("../../bin/devcluster")
		}
		if _, err := os.Stat(bin); err != nil {
			shared.skip = "no control plane to test against: build it with `go tool task build:devcluster`, or name it by FAIRLEAD_DEVCLUSTER"
			return
		}
		shared.c, shared.err = startCluster(bin)
	})
	if shared.skip != "" {
		t.Skip(shared.skip)
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.c
}

func startCluster(bin string) (_ *cluster, err error) {
	c := &cluster{binary: bin}
	if c.dir, err = os.MkdirTemp("", "fairlead-cloud-test"); err != nil {
		return nil, err
	}
	c.cmd = exec.Command(bin, "run", "--dir", c.dir, "--stop-on-stdin-close")
	c.cmd.Stderr = os.Stderr
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		c.stop()
		return nil, fmt.Errorf("the control plane did not start: %w", err)
	}
	for _, f := range strings.Fields(line) {
		if v, ok := strings.CutPrefix(f, "kubeconfig="); ok {
			c.kubeconfig = v
		}
	}
	if c.rest, err = clientcmd.BuildConfigFromFlags("", c.kubeconfig); err != nil {
		c.stop()
		return nil, err
	}
	c.rest.QPS, c.rest.Burst = 500, 1000
	if c.kube, err = kubernetes.NewForConfig(c.rest); err == nil {
		c.dyn, err = dynamic.NewForConfig(c.rest)
	}
	if err == nil {
		err = c.kubectl("apply", "-f", "../../schemas/crd", "-f", "../../deploy/cloud/rbac.yaml",
			"-f", "../../deploy/cloud/policies.yaml", "-f", "../../deploy/cloud/policies-pods.yaml")
	}
	if err == nil {
		err = c.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd/devices.fairlead.dev", "crd/devicemodels.fairlead.dev")
	}
	if err == nil {
		err = c.limit()
	}
	if err != nil {
		c.stop()
		return nil, err
	}
	return c, nil
}

// limit writes a kubeconfig for the service account of deploy/cloud/rbac.yaml.
func (c *cluster) limit() error {
	out, err := exec.Command(c.binary, "kubectl", "--kubeconfig", c.kubeconfig, "-n", "fairlead-system", "create", "token", "fairlead-cloud", "--duration=4h").Output()
	if err != nil {
		return fmt.Errorf("token of the service account: %w", err)
	}
	raw, err := clientcmd.LoadFromFile(c.kubeconfig)
	if err != nil {
		return err
	}
	for _, u := range raw.AuthInfos {
		u.ClientCertificate, u.ClientKey, u.ClientCertificateData, u.ClientKeyData = "", "", nil, nil
		u.Token = strings.TrimSpace(string(out))
	}
	c.limited = filepath.Join(c.dir, "limited.kubeconfig")
	return clientcmd.WriteToFile(*raw, c.limited)
}

func (c *cluster) kubectl(args ...string) error {
	out, err := exec.Command(c.binary, append([]string{"kubectl", "--kubeconfig", c.kubeconfig}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func (c *cluster) stop() {
	_ = c.stdin.Close()
	if err := c.cmd.Wait(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 0 {
			fmt.Fprintln(os.Stderr, "control plane:", err)
		}
	}
	_ = os.RemoveAll(c.dir)
}

var (
	devices = schema.GroupVersionResource{Group: "fairlead.dev", Version: "v1alpha1", Resource: "devices"}
	models  = schema.GroupVersionResource{Group: "fairlead.dev", Version: "v1alpha1", Resource: "devicemodels"}
)

// namespace makes a namespace of the test's own, and empties it at the end.
func (c *cluster) namespace(t *testing.T, prefix string) string {
	t.Helper()
	made, err := c.kube.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: prefix + "-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name := made.Name
	t.Cleanup(func() {
		ctx := context.Background()
		_ = c.dyn.Resource(devices).Namespace(name).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
		_ = c.dyn.Resource(models).Namespace(name).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{})
		now := int64(0)
		_ = c.kube.CoreV1().Pods(name).DeleteCollection(ctx, metav1.DeleteOptions{GracePeriodSeconds: &now}, metav1.ListOptions{})
	})
	// Pods are refused until the namespace's service account is there.
	eventually(t, "the default service account", func() bool {
		_, err := c.kube.CoreV1().ServiceAccounts(name).Get(t.Context(), "default", metav1.GetOptions{})
		return err == nil
	})
	return name
}

func (c *cluster) create(t *testing.T, r schema.GroupVersionResource, ns, name string, spec map[string]any) *unstructured.Unstructured {
	t.Helper()
	kind := map[schema.GroupVersionResource]string{devices: "Device", models: "DeviceModel"}[r]
	u, err := c.dyn.Resource(r).Namespace(ns).Create(t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "fairlead.dev/v1alpha1", "kind": kind,
		"metadata": map[string]any{"name": name, "namespace": ns}, "spec": spec,
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func (c *cluster) patch(t *testing.T, r schema.GroupVersionResource, ns, name, patch string) {
	t.Helper()
	if _, err := c.dyn.Resource(r).Namespace(ns).Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
}

func (c *cluster) delete(t *testing.T, r schema.GroupVersionResource, ns, name string) {
	t.Helper()
	if err := c.dyn.Resource(r).Namespace(ns).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		t.Fatal(err)
	}
}

// eventually waits until ok holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	end := time.Now().Add(deadline)
	for !ok() {
		if time.Now().After(end) {
			t.Fatalf("not in %s: %s", deadline, what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
