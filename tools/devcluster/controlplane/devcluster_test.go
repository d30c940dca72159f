package controlplane_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience is only there so that a broken devcluster fails a test and does not
// hang it.
const patience = 3 * time.Minute

// binary is devcluster: the file that DEVCLUSTER_BIN names, or a build with the
// flags of README.md, so that its packages come from the same build cache.
func binary(t *testing.T) string {
	t.Helper()
	if testing.Short() {
		t.Skip("needs the devcluster binary, which takes minutes to build when nothing is cached")
	}
	if name := os.Getenv("DEVCLUSTER_BIN"); name != "" {
		name, err := filepath.Abs(name)
		if err != nil {
			t.Fatal(err)
		}
		return name
	}
	name := filepath.Join(t.TempDir(), "devcluster")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags",
		"-s -w -X k8s.io/component-base/version.gitVersion=v1.37.2 -X k8s.io/client-go/pkg/version.gitVersion=v1.37.2",
		"-o", name, "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build devcluster: %v\n%s", err, out)
	}
	return name
}

// cluster is a running devcluster.
type cluster struct {
	t      *testing.T
	cmd    *exec.Cmd
	stdin  io.Closer
	stderr *bytes.Buffer // to be read after wait
	ready  string        // the line
	wait   func() error
}

func start(t *testing.T, bin, dir string) *cluster {
	t.Helper()
	c := &cluster{t: t, cmd: exec.Command(bin, "run", "--dir", dir, "--stop-on-stdin-close"), stderr: &bytes.Buffer{}}
	c.cmd.Stderr = c.stderr
	var err error
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	stdout, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(patience, func() { _ = c.cmd.Process.Kill() })
	c.wait = sync.OnceValue(func() error {
		defer watchdog.Stop()
		return c.cmd.Wait()
	})
	t.Cleanup(func() {
		_ = c.stdin.Close()
		_ = c.wait()
	})
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		err := errors.Join(err, c.wait())
		log, _ := os.ReadFile(filepath.Join(dir, "log"))
		t.Fatalf("no ready line: %v\nstderr:\n%s\nend of the log:\n%s", err, c.stderr, log[max(0, len(log)-4000):])
	}
	c.ready = strings.TrimSpace(line)
	return c
}

// field is the value of key=value in the ready line.
func (c *cluster) field(key string) string {
	c.t.Helper()
	for _, f := range strings.Fields(c.ready) {
		if v, ok := strings.CutPrefix(f, key+"="); ok {
			return v
		}
	}
	c.t.Fatalf("no %s in %q", key, c.ready)
	return ""
}

// processes are the ids of the processes with dir in their arguments.
func processes(t *testing.T, dir string) map[int]string {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	found := map[int]string{}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || !bytes.Contains(b, []byte(dir)) {
			continue // ended meanwhile, or not ours
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			t.Fatal(err)
		}
		found[pid] = strings.ReplaceAll(string(b), "\x00", " ")
	}
	return found
}

// until repeats cond until it gives no error.
func until(t *testing.T, what string, cond func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		err := cond()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: %v", what, err)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func TestDevcluster(t *testing.T) {
	bin := binary(t)
	// Longer than the path of a Unix socket may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long-", 20))
	kubectlLink := filepath.Join(t.TempDir(), "kubectl")
	if err := os.Symlink(bin, kubectlLink); err != nil {
		t.Fatal(err)
	}
	var c *cluster
	kubectl := func(args ...string) (string, error) {
		cmd := exec.Command(kubectlLink, args...)
		cmd.Env = append(os.Environ(), "KUBECONFIG="+c.field("kubeconfig"))
		out, err := cmd.CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("kubectl %s: %w\n%s", strings.Join(args, " "), err, out)
		}
		return string(out), nil
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := kubectl(args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}

	t.Log("first run: new data")
	c = start(t, bin, dir)
	server := c.field("server")
	if !strings.HasPrefix(c.ready, "ready ") || c.field("kubeconfig") != filepath.Join(dir, "kubeconfig") {
		t.Errorf("ready line %q", c.ready)
	}
	if info, err := os.Stat(c.field("kubeconfig")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("kubeconfig: %v, %v; want mode 0600", info.Mode(), err)
	}
	if out := must("version"); strings.Count(out, "v1.37.2") != 2 {
		t.Errorf("versions of kubectl and server:\n%s\nwant v1.37.2 twice", out)
	}
	must("create", "namespace", "kept")
	must("-n", "kept", "create", "configmap", "kept", "--from-literal=answer=42")
	must("get", "serviceaccount", "default")
	if out := must("-n", "kube-system", "get", "configmap", "extension-apiserver-authentication", "-o", "jsonpath={.data}"); !strings.Contains(out, "requestheader-client-ca-file") {
		t.Errorf("extension-apiserver-authentication lacks the request header authority: %s", out)
	}
	must("create", "deployment", "waiting", "--image=none.invalid/none")
	until(t, "the deployment's pod is seen by the scheduler", func() error {
		out, err := kubectl("get", "pods", "-l", "app=waiting", "-o",
			`jsonpath={range .items[*]}{.status.phase} {.status.conditions[?(@.type=="PodScheduled")].reason}{end}`)
		if err == nil && out != "Pending Unschedulable" {
			err = fmt.Errorf("pods: %q", out)
		}
		return err
	})
	checkAnonymous(t, server)
	if tcp := listening(t, dir); len(tcp) != 1 {
		t.Errorf("TCP sockets that listen: %q; want the API server's alone", tcp)
	}

	t.Log("another one on the same folder")
	out, err := exec.Command(bin, "run", "--dir", dir).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "in use by another devcluster") || !strings.Contains(string(out), fmt.Sprintf("kill %d", c.cmd.Process.Pid)) {
		t.Errorf("second instance: %v, %s; want a refusal that says what to do", err, out)
	}
	must("get", "--raw", "/readyz") // the first does not care

	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.wait(); err != nil {
		t.Errorf("after SIGTERM: %v; want exit code 0\n%s", err, c.stderr)
	}
	if left := processes(t, dir); len(left) > 0 {
		t.Errorf("left after SIGTERM: %v", left)
	}

	t.Log("second run: the same data, killed")
	c = start(t, bin, dir)
	if got := c.field("server"); got != server {
		t.Errorf("server %s, want %s as before", got, server)
	}
	if out := must("-n", "kept", "get", "configmap", "kept", "-o", "jsonpath={.data.answer}"); out != "42" {
		t.Errorf("configmap after a restart: %q, want 42", out)
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := c.wait(); err == nil {
		t.Error("killed, yet exit code 0")
	}
	// No waiting here: the next run must cope with children that are just ending.

	t.Log("third run: standard input closed")
	c = start(t, bin, dir)
	if n := len(processes(t, dir)); n != 5 {
		t.Errorf("%d processes, want 5: those of the killed run are gone", n)
	}
	must("-n", "kept", "get", "configmap", "kept")
	if err := c.stdin.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.wait(); err != nil {
		t.Errorf("after stdin was closed: %v; want exit code 0\n%s", err, c.stderr)
	}
	if left := processes(t, dir); len(left) > 0 {
		t.Errorf("left after stdin was closed: %v", left)
	}

	t.Log("fourth run: a component dies")
	c = start(t, bin, dir)
	for pid, args := range processes(t, dir) {
		if strings.Contains(args, " kube-scheduler ") {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	err = c.wait()
	if err == nil || !strings.Contains(c.stderr.String(), "kube-scheduler ended by itself") || !strings.Contains(c.stderr.String(), filepath.Join(dir, "log")) {
		t.Errorf("after the scheduler's death: %v\n%s\nwant a failure that names it and the log", err, c.stderr)
	}
	if left := processes(t, dir); len(left) > 0 {
		t.Errorf("left after the scheduler's death: %v", left)
	}
}

// checkAnonymous asks without credentials.
func checkAnonymous(t *testing.T, server string) {
	t.Helper()
	client := &http.Client{
		Timeout:   patience,
		Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true},
	}
	for path, want := range map[string]int{
		"/readyz":            http.StatusOK,
		"/version":           http.StatusUnauthorized,
		"/api/v1/namespaces": http.StatusUnauthorized,
	} {
		resp, err := client.Get(server + path)
		if err != nil {
			t.Errorf("GET %s: %v", path, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("GET %s without credentials: %d, want %d", path, resp.StatusCode, want)
		}
	}
}

// listening are the local addresses of the TCP sockets on which the processes
// with dir in their arguments listen.
func listening(t *testing.T, dir string) []string {
	t.Helper()
	inodes := map[string]bool{}
	for pid := range processes(t, dir) {
		fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if link, err := os.Readlink(fd); err == nil {
				if inode, ok := strings.CutPrefix(link, "socket:["); ok {
					inodes[strings.TrimSuffix(inode, "]")] = true
				}
			}
		}
	}
	var addrs []string
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(table)
		if err != nil {
			continue // a kernel without IPv6
		}
		for line := range strings.Lines(string(b)) {
			// sl local_address rem_address st … inode; state 0A is LISTEN
			f := strings.Fields(line)
			if len(f) > 9 && f[3] == "0A" && inodes[f[9]] {
				addrs = append(addrs, f[1])
			}
		}
	}
	return addrs
}
