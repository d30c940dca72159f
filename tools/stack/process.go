// Package stack starts and stops the real parts of Fairlead as processes: the
// demo, the end-to-end tests and the benchmarks stand on it.
//
//	s, err := stack.New(stack.Config{Bin: "bin", Dir: dir})
//	err = s.StartCluster(ctx)
//	err = s.StartCloud(ctx)
//	e, err := s.StartEdge(ctx, "plant-7")
//	defer s.Stop()
package stack

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Process is a child process whose output goes to a log file. It ends with us:
// the kernel kills it if we die first.
type Process struct {
	Name string
	Log  string // path of its log file
	cmd  *exec.Cmd
	in   io.Closer
	done chan struct{}
	err  error
	once sync.Once
}

// start runs a program. enter, where it is not nil, moves the thread that starts
// it to where it is to run, such as a network namespace. ready, where it is not nil, sees its standard output
// line by line; start returns when ready said true, or with an error that ends
// in the log's last lines when the program ended first.
func start(ctx context.Context, enter func() error, logDir, name, program string, args []string, ready func(line string) bool) (*Process, error) {
	p := &Process{Name: name, Log: filepath.Join(logDir, name+".log"), done: make(chan struct{})}
	f, err := os.OpenFile(p.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	p.cmd = exec.Command(program, args...)
	p.cmd.Stderr = f
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	stdin, err := p.cmd.StdinPipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	p.in = stdin
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", name, err), f.Close())
	}
	started := make(chan error, 1)
	isReady := make(chan struct{})
	go func() {
		// Pdeathsig is sent when the thread that started the child ends, so the
		// thread stays as long as the child does, and ends with the goroutine.
		runtime.LockOSThread()
		var err error
		if enter != nil {
			err = enter()
		}
		if err == nil {
			err = p.cmd.Start()
		}
		started <- err
		if err != nil {
			close(p.done)
			_ = f.Close()
			return
		}
		waiting := ready != nil
		for s := bufio.NewScanner(stdout); s.Scan(); {
			_, _ = fmt.Fprintln(f, s.Text())
			if waiting && ready(s.Text()) {
				waiting = false
				close(isReady)
			}
		}
		p.err = p.cmd.Wait()
		_ = f.Close()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if ready == nil {
		return p, nil
	}
	select {
	case <-isReady:
		return p, nil
	case <-p.done:
		return nil, fmt.Errorf("%s ended before it was ready: %w\n%s", name, p.exit(), p.Tail(15))
	case <-ctx.Done():
		p.Stop()
		return nil, fmt.Errorf("%s was not ready in time: %w\n%s", name, ctx.Err(), p.Tail(15))
	}
}

func (p *Process) exit() error {
	if p.err == nil {
		return errors.New("exit status 0")
	}
	return p.err
}

// Exit says how the process ended; it is for after Done.
func (p *Process) Exit() error { return p.exit() }

// PID is the process id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Tail gives the log's last lines.
func (p *Process) Tail(n int) string {
	b, err := os.ReadFile(p.Log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Kill ends the process with SIGKILL and waits until it is gone.
func (p *Process) Kill() { p.end(syscall.SIGKILL, 0) }

// Stop ends the process with SIGTERM, and with SIGKILL after 20 seconds.
func (p *Process) Stop() { p.end(syscall.SIGTERM, 20*time.Second) }

func (p *Process) end(sig syscall.Signal, grace time.Duration) {
	p.once.Do(func() {
		_ = p.cmd.Process.Signal(sig)
		if grace > 0 {
			select {
			case <-p.done:
			case <-time.After(grace):
				_ = p.cmd.Process.Kill()
			}
		}
	})
	<-p.done
	_ = p.in.Close()
}

// Signal sends a signal.
func (p *Process) Signal(s os.Signal) error { return p.cmd.Process.Signal(s) }

// FreePort gives a TCP port of 127.0.0.1 that was free a moment ago. Parts that
// must come back on the same port cannot leave the choice to the system.
func FreePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	defer func() { _ = l.Close() }()
	return l.Addr().(*net.TCPAddr).Port, nil
}
