package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/tools/testruntime"
)

// binaries gives the folder of the built binaries, which only the tasks make.
func binaries(t *testing.T) string {
	t.Helper()
	bin := os.Getenv("FAIRLEAD_BIN")
	if bin == "" {
		t.Skip("FAIRLEAD_BIN is not set: `go tool task test:e2e` builds the binaries and sets it")
	}
	for _, b := range []string{"fairlead-demo", "devcluster"} {
		if _, err := os.Stat(filepath.Join(bin, b)); err != nil {
			t.Skipf("%s is not built: go tool task build", b)
		}
	}
	return bin
}

// running is a demo that the test started.
type running struct {
	cmd  *exec.Cmd
	done chan struct{}

	mu    sync.Mutex
	lines []string
}

// launch starts a demo; the working directory is the repository's root.
func launch(t *testing.T, bin, dir string, args ...string) *running {
	t.Helper()
	r := &running{done: make(chan struct{})}
	r.cmd = exec.Command(filepath.Join(bin, "fairlead-demo"), append([]string{"--dir", dir, "--edge-port", "0", "--cloud-port", "0", "--modbus-port", "0"}, args...)...)
	r.cmd.Dir = "../../.."
	// A kubeconfig that happens to be around is not the demo's business.
	r.cmd.Env = append(os.Environ(), "KUBECONFIG=/nowhere")
	out, err := r.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	r.cmd.Stderr = r.cmd.Stdout
	if err := r.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(r.done)
		for s := bufio.NewScanner(out); s.Scan(); {
			r.mu.Lock()
			r.lines = append(r.lines, s.Text())
			r.mu.Unlock()
		}
		_ = r.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = r.cmd.Process.Kill() // a failed test leaves nothing behind either
		<-r.done
	})
	return r
}

func (r *running) output() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return strings.Join(r.lines, "\n")
}

// says waits for a line of the demo.
func (r *running) says(t *testing.T, pattern string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	for end := time.Now().Add(3 * time.Minute); !re.MatchString(r.output()); time.Sleep(50 * time.Millisecond) {
		select {
		case <-r.done:
			if re.MatchString(r.output()) {
				return
			}
			t.Fatalf("the demo ended before it said %q:\n%s", pattern, r.output())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("the demo did not say %q:\n%s", pattern, r.output())
		}
	}
}

// stop sends SIGINT, as Ctrl-C does, and waits for the end.
func (r *running) stop(t *testing.T) {
	t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.done:
	case <-time.After(time.Minute):
		t.Fatalf("the demo did not stop within a minute:\n%s", r.output())
	}
	if code := r.cmd.ProcessState.ExitCode(); code != 0 {
		t.Errorf("the demo ended with exit code %d:\n%s", code, r.output())
	}
}

// pasted are the lines to paste that the demo printed.
func (r *running) pasted() []string {
	var out []string
	for _, l := range strings.Split(r.output(), "\n") {
		if c, ok := strings.CutPrefix(l, prompt); ok {
			out = append(out, c)
		}
	}
	return out
}

// paste runs a line in a shell of its own, in the repository's root, as a
// second terminal would.
func paste(t *testing.T, th thing, line string) {
	t.Helper()
	want := regexp.MustCompile(th.want)
	var out safeBuffer
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-c", line)
	cmd.Dir = "../../.."
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if th.endless {
		for tick := time.NewTicker(20 * time.Millisecond); ; {
			if want.MatchString(out.String()) {
				tick.Stop()
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) // Ctrl-C
				//nolint:errcheck // by a signal, or as it likes
				<-ended
				return
			}
			select {
			case err := <-ended:
				tick.Stop()
				if err != nil || !want.MatchString(out.String()) {
					t.Errorf("$ %s\nended: %v; want output like %s\n%s", line, err, th.want, out.String())
				}
				return
			case <-tick.C:
			}
		}
	}
	fails := th.fails || th.insteadFails && !hasMosquitto()
	err := <-ended
	var exit *exec.ExitError
	if fails != errors.As(err, &exit) || err != nil && exit == nil || !want.MatchString(out.String()) {
		t.Errorf("$ %s\n%v; want failure %v and output like %s\n%s", line, err, fails, th.want, out.String())
	}
}

type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *safeBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *safeBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// TestDemo runs the demo, pastes every line that it prints, stops it, sees that
// nothing is left, and runs it again on the same data.
func TestDemo(t *testing.T) {
	bin, dir := binaries(t), filepath.Join(t.TempDir(), "demo")
	r := launch(t, bin, dir)
	r.says(t, `(?m)^running; stop it with`)
	lines := r.pasted()
	noPods := testruntime.Missing()
	if noPods != nil {
		t.Logf("SKIP the mapper as a container: %v", noPods)
		r.says(t, `the edge node runs no pods: .*apt-get install`)
	}
	shown := slices.DeleteFunc(slices.Clone(things), func(th thing) bool { return th.pods && noPods != nil })
	if len(lines) != len(shown) {
		t.Fatalf("%d lines to paste, %d in the table:\n%s", len(lines), len(shown), r.output())
	}
	for i, th := range shown {
		t.Run(fmt.Sprintf("line %d", i+1), func(t *testing.T) {
			t.Log("$ ", lines[i])
			if strings.Contains(lines[i], "mosquitto") && !hasMosquitto() {
				t.Fatal("the line needs what is not there")
			}
			paste(t, th, lines[i])
		})
		switch th.say {
		case "gone":
			r.says(t, `the cloud is gone \(signal: killed\): the edge carries on without it`)
		case "and back":
			r.says(t, `the cloud is up again(.*\n)*cloud and edge agree again`)
		}
	}
	if t.Failed() {
		t.Logf("the demo said:\n%s", r.output())
	}

	t.Run("the operator's command on the cluster", func(t *testing.T) {
		cluster := " --kubeconfig " + filepath.Join(dir, "cluster", "kubeconfig")
		// The bridge was killed and has just come back; the mirror in Kubernetes follows.
		paste(t, thing{want: "condition met"}, filepath.Join(dir, "kubectl")+" wait --for=condition=Ready device/pump-1 --timeout=30s")
		for _, c := range []struct {
			line, want string
			fails      bool
		}{
			{"bin/fairlead nodes", `(?m)^plant-7 +True `, false},
			{"bin/fairlead devices", `(?m)^pump-1 +plant-7 +modbus +Online +11/11 `, false},
			{"bin/fairlead devices -o json", `"state": "Online"`, false},
			{"bin/fairlead twin get pump-1/pressure", `(?m)^pump-1/pressure +[0-9.]+ +bar +good `, false},
			{"bin/fairlead twin set pump-1/speedSetpoint 61 --wait", `^applied pump-1/speedSetpoint = 61, rev [0-9]+, in [0-9]+ ms\n$`, false},
			{"bin/fairlead twin set pump-1/speedSetpoint 400", `refused: .*400 is above the maximum 100 %`, true},
			{"bin/fairlead twin set pump-1/speedSetpoint fast", `refused: .*speedSetpoint`, true},
			{"bin/fairlead twin set pump-9/speedSetpoint 40", `"pump-9" not found`, true},
			{"bin/fairlead twin set pump-1/speedSetpoint null", `wished default/pump-1/speedSetpoint = -`, false},
			{"bin/fairlead twin set pump-1/speedSetpoint 45 --wait", `= 45`, false},
			{"bin/fairlead token list", `(?m)^plant-7 +\S+ +-$`, false},
			{"bin/fairlead token create --node plant-8 2>/dev/null", `^[A-Za-z0-9_-]{43}\n$`, false},
			{"bin/fairlead token create --node plant-8", `has a token already.* with --force`, true},
			{"bin/fairlead token create --node plant-8 --force 2>/dev/null", `^[A-Za-z0-9_-]{43}\n$`, false},
			{"bin/fairlead token list -o json", `"node": "plant-8"`, false},
			{"bin/fairlead token revoke --node plant-8", `token of node plant-8 revoked`, false},
			{"bin/fairlead token revoke --node plant-8", `the node has no token`, true},
		} {
			command, redirect, _ := strings.Cut(c.line, " 2>")
			if redirect != "" {
				redirect = " 2>" + redirect
			}
			paste(t, thing{want: c.want, fails: c.fails}, command+cluster+redirect)
		}
	})

	t.Run("parts go and come", func(t *testing.T) {
		order := func(words, want string) {
			paste(t, thing{want: want}, "bin/fairlead-demo "+words+" --dir "+dir)
		}
		order("stop edge", `the edge is gone`)
		order("stop edge", `the edge is down already`)
		order("start edge", `the edge is up again .*agree`)
		order("start edge", `the edge is up already`)
		order("stop station", `the station is gone`)
		r.says(t, `station DOWN [0-9]+ s .*pump-1 Offline`)
		order("start station", `the station is up again`)
		if noPods == nil {
			paste(t, thing{want: "the mapper is a pod here", fails: true}, "bin/fairlead-demo stop mapper --dir "+dir)
			kubectl := filepath.Join(dir, "kubectl")
			paste(t, thing{want: `pod "modbus-mapper-.*deleted`}, kubectl+" delete pod -l app=modbus-mapper")
			paste(t, thing{want: "successfully rolled out"}, kubectl+" rollout status daemonset/modbus-mapper --timeout=60s")
			paste(t, thing{want: "condition met"}, kubectl+" wait --for=condition=Ready device/pump-1 pod/dashboard --timeout=60s")
		} else {
			order("stop mapper", `the mapper is gone`)
			order("start mapper", `the mapper is up again`)
		}
	})

	t.Run("a second demo in the same folder", func(t *testing.T) {
		second := launch(t, bin, dir)
		second.says(t, `another demo runs in .*, as process `+strconv.Itoa(r.cmd.Process.Pid))
		<-second.done
		if second.cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("exit code %d", second.cmd.ProcessState.ExitCode())
		}
	})

	ports := listeners(t, r.cmd.Process.Pid)
	if len(ports) < 5 {
		t.Errorf("only the ports %v: the test does not see the demo's listeners", ports)
	}
	before := processes(t, dir)
	if len(before) < 6 {
		t.Errorf("only the processes %q: the test does not see the demo's", before)
	}
	r.stop(t)
	nothingLeft(t, dir, ports)

	t.Run("again", func(t *testing.T) {
		again := launch(t, bin, dir)
		again.says(t, `(?m)^running; stop it with`)
		// What was wished in the first run still holds.
		again.says(t, `→ 45 by (local|cloud)`)
		ports := listeners(t, again.cmd.Process.Pid)
		// Not even a killed demo leaves anything.
		_ = again.cmd.Process.Kill()
		<-again.done
		time.Sleep(time.Second) // the kernel sends the signals, the processes die
		nothingLeft(t, dir, ports)
	})
}

// processes lists the processes that have the folder in their command line.
func processes(t *testing.T, dir string) []string {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, f := range all {
		b, err := os.ReadFile(f)
		if err == nil && bytes.Contains(b, []byte(dir)) {
			out = append(out, string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
		}
	}
	return out
}

// listeners gives the local TCP ports on which a process and its children listen.
func listeners(t *testing.T, pid int) []int {
	t.Helper()
	inodes := map[string]bool{}
	pids := []string{strconv.Itoa(pid)}
	for i := 0; i < len(pids); i++ {
		children, _ := filepath.Glob("/proc/" + pids[i] + "/task/*/children")
		for _, f := range children {
			b, _ := os.ReadFile(f)
			pids = append(pids, strings.Fields(string(b))...)
		}
		fds, _ := filepath.Glob("/proc/" + pids[i] + "/fd/*")
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "socket:[") {
				inodes[strings.Trim(to, "socket:[]")] = true
			}
		}
	}
	b, err := os.ReadFile("/proc/net/tcp")
	if err != nil {
		t.Skipf("cannot see the ports: %v", err)
	}
	var out []int
	for _, l := range strings.Split(string(b), "\n")[1:] {
		f := strings.Fields(l)
		if len(f) < 10 || f[3] != "0A" || !inodes[f[9]] { // 0A is LISTEN
			continue
		}
		_, hex, _ := strings.Cut(f[1], ":")
		p, err := strconv.ParseUint(hex, 16, 16)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, int(p))
	}
	return out
}

func nothingLeft(t *testing.T, dir string, ports []int) {
	t.Helper()
	if left := processes(t, dir); len(left) > 0 {
		t.Errorf("processes left behind:\n%s", strings.Join(left, "\n"))
	}
	for _, p := range ports {
		l, err := net.Listen("tcp", local(p))
		if err != nil {
			t.Errorf("port %d is still taken: %v", p, err)
			continue
		}
		_ = l.Close()
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err == nil && bytes.Contains(mounts, []byte(dir)) {
		t.Errorf("a mount is left below %s", dir)
	}
}

// TestMistakes are command lines that cannot work.
func TestMistakes(t *testing.T) {
	bin := binaries(t)
	for _, c := range []struct{ args, want string }{
		{"start cloud --dir " + t.TempDir(), "no demo runs in"},
		{"start moon", `invalid argument "moon"`},
		{"--kubeconfig /nowhere", "--kubeconfig: stat /nowhere: no such file"},
		{"--edge-port 70000", "--edge-port 70000: want 0 to 65535"},
		{"now", `unknown command "now"`},
	} {
		cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "fairlead-demo"), strings.Fields(c.args)...)
		cmd.Dir = "../../.."
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.want) {
			t.Errorf("fairlead-demo %s: %v, want an error with %q:\n%s", c.args, err, c.want, out)
		}
	}
}

// TestLines checks that the lines work in the places that they name.
func TestLines(t *testing.T) {
	p := place{bin: "bin", dir: ".demo", edge: 1883, cloud: 2883, mosquitto: true}
	all := strings.Join(list(p), "\n")
	for _, want := range []string{
		prompt + ".demo/kubectl get devices\n", prompt + "bin/fairlead twin watch pump-1\n", prompt + "bin/fairlead-demo start cloud\n",
		prompt + "mosquitto_sub -p 1883 -t 'fl/plant-7/#' -v\n",
	} {
		if !strings.Contains(all, want) {
			t.Errorf("no line %q in\n%s", want, all)
		}
	}
	p = place{bin: "bin", dir: "'/a b'", edge: 4001, cloud: 4002}
	all = strings.Join(list(p), "\n")
	if strings.Contains(all, "mosquitto_") || !strings.Contains(all, "apt-get install mosquitto-clients") ||
		!strings.Contains(all, "bin/fairlead twin watch pump-1 --broker mqtt://127.0.0.1:4001\n") || !strings.Contains(all, "bin/fairlead-demo start cloud --dir '/a b'\n") {
		t.Errorf("without mosquitto-clients:\n%s", all)
	}
	if got := quote("it's"); got != `'it'\''s'` {
		t.Errorf("quote: %s", got)
	}
}
