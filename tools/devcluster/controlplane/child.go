package controlplane

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Component is the first argument with which the executable is started again.
type Component string

// The components, in the order of their start.
const (
	Etcd              Component = "etcd"
	APIServer         Component = "kube-apiserver"
	ControllerManager Component = "kube-controller-manager"
	Scheduler         Component = "kube-scheduler"
	// Kubelet is a node's, in a run of its own: [RunKubelet].
	Kubelet Component = "kubelet-process"
)

// File descriptors that children inherit, besides the lock at 3, which they only
// keep open.
const (
	// ReadyFD is a pipe to which etcd writes one byte when it is ready.
	ReadyFD = 4
	// ListenerFD is the listening TCP socket of the API server.
	ListenerFD = 4
)

// EtcdSocket is etcd's Unix socket, relative to the working directory of the
// components: an absolute path could exceed the 107 bytes that a socket's may have.
const EtcdSocket = "etcd.sock"

// stopTimeouts are how long components get for an orderly end. After that they
// are killed, which costs nothing: etcd keeps what it acknowledged. The API
// server may wait for clients that keep connections open.
var stopTimeouts = map[Component]time.Duration{
	Etcd: 10 * time.Second, APIServer: 10 * time.Second, ControllerManager: 5 * time.Second, Scheduler: 5 * time.Second,
	Kubelet: 10 * time.Second,
}

// child is one running component.
type child struct {
	name Component
	cmd  *exec.Cmd
	out  *logWriter
	// gone is closed when the process was waited for; err is set before.
	gone chan struct{}
	err  error
}

// children starts, watches and stops the components. Only the goroutine of [Run]
// uses it, because the kernel ties a child to the thread that made it.
type children struct {
	logger  *slog.Logger
	log     io.Writer
	logPath string
	logMu   sync.Mutex // one line at a time into log
	workDir string
	lock    *os.File
	binary  string // in place of this executable
	running []*child
	// died gets every child whose process ended. Its bound is the number of
	// components, so the waiting goroutines never block.
	died chan *child
}

func (k *children) startEtcd(dir folder) (ready <-chan error, err error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("pipe to etcd: %w", err)
	}
	err = k.start(Etcd, []string{"--data-dir=" + dir.path("etcd")}, w)
	if err := errors.Join(err, w.Close()); err != nil {
		r.Close()
		return nil, err
	}
	c := make(chan error, 1)
	// Ends with etcd at the latest, which holds the only other end.
	go func() {
		defer r.Close()
		if _, err := r.Read(make([]byte, 1)); err == nil {
			c <- nil
		} // else etcd died, which await reports
	}()
	return c, nil
}

func (k *children) startAPIServer(args []string, l *net.TCPListener) error {
	file, err := l.File()
	if err != nil {
		return fmt.Errorf("listener for the API server: %w", err)
	}
	// Both copies here are closed: after the API server's death its clients are to
	// be refused, not kept waiting in a queue that nobody serves.
	return errors.Join(k.start(APIServer, args, file), file.Close(), l.Close())
}

// start starts a component with further files from descriptor 4 on.
func (k *children) start(name Component, args []string, files ...*os.File) error {
	if k.died == nil {
		k.died = make(chan *child, len(stopTimeouts))
	}
	c := &child{name: name, gone: make(chan struct{}), out: &logWriter{name: name, k: k}}
	path, argv := executable(), append([]string{"devcluster", string(name)}, args...)
	if k.binary != "" {
		path, argv = k.binary, append([]string{k.binary}, args...)
	}
	c.cmd = &exec.Cmd{
		Path:       path,
		Args:       argv,
		Dir:        k.workDir,
		Env:        childEnv(name, os.Environ()),
		Stdout:     c.out,
		Stderr:     c.out,
		ExtraFiles: append([]*os.File{k.lock}, files...),
		SysProcAttr: &syscall.SysProcAttr{
			// If this process is killed, so are the children, whatever they do.
			Pdeathsig: syscall.SIGKILL,
			// Ctrl-C at a terminal is for this process, which stops them in order.
			Setpgid: true,
		},
		WaitDelay: time.Second,
	}
	if err := c.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", name, err)
	}
	k.running = append(k.running, c)
	go func() { // ends with the process, which stop waits for
		c.err = c.cmd.Wait()
		c.out.flush()
		close(c.gone)
		k.died <- c
	}()
	return nil
}

// executable is the file of this program. /proc/self/exe always works, but would
// make ps and ss call the components "exe".
func executable() string {
	if name, err := os.Executable(); err == nil {
		if _, err := os.Stat(name); err == nil {
			return name
		}
	}
	return "/proc/self/exe" // the file was deleted or replaced meanwhile
}

// childEnv is env without proxies, for the components talk to nobody but each
// other, and with a garbage collector set to small heaps if env does not set it:
// 373 MB of PSS for all processes instead of 418, at the same time to start. The
// kubelet is what others are measured by, so it runs as it does anywhere.
func childEnv(name Component, env []string) []string {
	gogc := []string{"GOGC=50"}
	if name == Kubelet {
		gogc = nil
	}
	var kept []string
	for _, e := range env {
		key, _, _ := strings.Cut(e, "=")
		switch strings.ToLower(key) {
		case "http_proxy", "https_proxy", "all_proxy":
			continue
		case "gogc":
			gogc = nil
		}
		kept = append(kept, e)
	}
	return append(kept, gogc...)
}

// await waits until done gives a value, a child dies or ctx ends; only the first
// is no error. A nil done never gives one.
func (k *children) await(ctx context.Context, what string, done <-chan error) error {
	select {
	case err := <-done:
		return err
	case c := <-k.died:
		return k.explain(c)
	case <-ctx.Done():
		return fmt.Errorf("wait for %s: %w; the log may say what it lacks: %s", what, ctx.Err(), k.logPath)
	}
}

// explain is the error of a child that ended without being asked to.
func (k *children) explain(c *child) error {
	status := "exit code 0"
	if c.err != nil {
		status = c.err.Error()
	}
	if last := c.out.lastErrors(); last != "" {
		return fmt.Errorf("%s ended by itself (%s), so all is stopped; its last errors:\n%s\nall of its log: %s", c.name, status, last, k.logPath)
	}
	return fmt.Errorf("%s ended by itself (%s), so all is stopped; its log: %s", c.name, status, k.logPath)
}

// stop ends all children in the reverse order of their start, the controller
// manager and the scheduler together, and returns when none is left.
func (k *children) stop() error {
	var errs []error
	for len(k.running) > 0 {
		group := k.running[len(k.running)-1:]
		if n := len(k.running); n >= 2 && group[0].name == Scheduler {
			group = k.running[n-2:]
		}
		k.running = k.running[:len(k.running)-len(group)]
		for _, c := range group {
			if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
				errs = append(errs, fmt.Errorf("stop %s: %w", c.name, err))
			}
		}
		for _, c := range group {
			timeout := time.NewTimer(stopTimeouts[c.name])
			select {
			case <-c.gone:
			case <-timeout.C:
				k.logger.Warn("component did not stop in time, killing it", "component", c.name, "log", k.logPath)
				if err := c.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
					errs = append(errs, fmt.Errorf("kill %s: %w", c.name, err))
				}
				<-c.gone
			}
			timeout.Stop()
		}
	}
	return errors.Join(errs...)
}

// logWriter writes a component's lines to the log with its name, and keeps the
// last lines that are errors. os/exec writes to it from one goroutine; flush
// comes after that one has ended.
type logWriter struct {
	name   Component
	k      *children
	part   []byte
	errors []string // written by one goroutine, read after child.gone
}

// keptErrors and keptErrorLen bound what a person gets to see of an end.
const (
	keptErrors   = 5
	keptErrorLen = 600
	maxLine      = 64 << 10
)

func (w *logWriter) Write(p []byte) (int, error) {
	w.part = append(w.part, p...)
	for {
		i := bytes.IndexByte(w.part, '\n')
		if i < 0 {
			if len(w.part) < maxLine {
				return len(p), nil
			}
			i = maxLine - 1
		}
		if err := w.line(w.part[:i+1]); err != nil {
			return 0, err
		}
		w.part = w.part[i+1:]
	}
}

func (w *logWriter) flush() {
	if len(w.part) > 0 {
		_ = w.line(w.part) // the log is full or gone; the process has ended anyway
		w.part = nil
	}
}

func (w *logWriter) line(line []byte) error {
	s := strings.TrimRight(string(line), "\n")
	if isError(s) {
		if len(s) > keptErrorLen {
			s = s[:keptErrorLen] + " …"
		}
		if len(w.errors) == keptErrors {
			w.errors = w.errors[1:]
		}
		w.errors = append(w.errors, s)
	}
	w.k.logMu.Lock()
	defer w.k.logMu.Unlock()
	_, err := fmt.Fprintf(w.k.log, "%s | %s\n", w.name, strings.TrimRight(string(line), "\n"))
	return err
}

// lastErrors may be called once the child is gone.
func (w *logWriter) lastErrors() string {
	if len(w.errors) == 0 {
		return ""
	}
	return "  " + strings.Join(w.errors, "\n  ")
}

// isError knows klog's E and F lines, zap's JSON and what a Go program says when
// it ends.
func isError(line string) bool {
	if len(line) > 5 && (line[0] == 'E' || line[0] == 'F') && strings.Trim(line[1:5], "0123456789") == "" {
		return true
	}
	for _, prefix := range []string{"Error:", "panic:", "fatal error:", `{"level":"error"`, `{"level":"fatal"`, `{"level":"panic"`} {
		if strings.HasPrefix(line, prefix) {
			return true
		}
	}
	return false
}
