package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/fairlead-io/fairlead/tools/stack"
)

// who is a broker under test.
type who string

const (
	ours   who = "ours"
	theirs who = "mosquitto"
)

// running is a broker with empty data, started for one run.
type running struct {
	who   who
	proc  *stack.Process
	addrs []string // listeners; all but our idle figure need one
	dir   string   // its data
}

func (r *running) addr() string { return r.addrs[0] }

// stop ends the broker at once and removes its data.
func (r *running) stop() {
	r.proc.Kill()
	_ = os.RemoveAll(r.dir)
}

// mosquittoConf is what every figure runs mosquitto with; in memory only, as
// that is its fastest, and without a bound on queues, as it would drop there.
// More than its 20 messages may be in flight: it is also the Receive Maximum
// that it tells a publisher, whose window of 64 it has to allow.
const mosquittoConf = `listener %d 127.0.0.1
allow_anonymous true
persistence false
max_queued_messages 0
max_inflight_messages 100
set_tcp_nodelay %t
log_dest stderr
log_type error
log_type warning
`

// options are what one figure needs of the brokers.
type options struct {
	// clients is how many connect at once, where it is more than ours takes.
	clients int
	// noDelay switches Nagle's algorithm off in mosquitto. On, which is its
	// default, its throughput is half as high again; off, an acknowledgement
	// does not wait for the next packet. Each figure takes what is better for it.
	noDelay bool
}

// start starts a broker with empty data.
func (b *bench) start(ctx context.Context, w who, o options) (*running, error) {
	dir, err := os.MkdirTemp(b.dir, string(w)+"-")
	if err != nil {
		return nil, err
	}
	r := &running{who: w, dir: dir}
	if w == theirs {
		err = b.startMosquitto(ctx, r, o)
	} else {
		err = b.startOurs(ctx, r, o)
	}
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return r, nil
}

func (b *bench) startMosquitto(ctx context.Context, r *running, o options) error {
	port, err := stack.FreePort()
	if err != nil {
		return err
	}
	conf := filepath.Join(r.dir, "mosquitto.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, mosquittoConf, port, o.noDelay), 0o600); err != nil {
		return err
	}
	r.addrs = []string{fmt.Sprintf("127.0.0.1:%d", port)}
	r.proc, err = b.s.StartProgram(ctx, "mosquitto", b.mosquitto, r.addr(), "-c", conf)
	return err
}

// maxOnListener is how many clients a listener of fairlead-edge takes, less a
// few, where it has no flag for it.
const maxOnListener = 250

func (b *bench) startOurs(ctx context.Context, r *running, o options) error {
	args := []string{"run", "--node", node, "--data", r.dir, "--log-level", "warn"}
	listeners := 1
	if o.clients > 0 {
		if b.edgeHas("--max-clients") {
			args = append(args, "--max-clients", fmt.Sprint(o.clients+16))
		} else {
			listeners = (o.clients + maxOnListener - 1) / maxOnListener
		}
	}
	for range listeners {
		port, err := stack.FreePort()
		if err != nil {
			return err
		}
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		r.addrs = append(r.addrs, addr)
		args = append(args, "--mqtt", addr)
	}
	var err error
	r.proc, err = b.s.StartProgram(ctx, "fairlead-edge", b.edge(), r.addr(), args...)
	return err
}

func (b *bench) edge() string { return filepath.Join(b.s.Bin, "fairlead-edge") }

func (b *bench) edgeHas(flag string) bool {
	out, _ := exec.Command(b.edge(), "run", "--help").CombinedOutput()
	return strings.Contains(string(out), flag+" ")
}

var versionPattern = regexp.MustCompile(`mosquitto version (\S+)`)

// findMosquitto gives the program's path and version; both are empty where
// there is none.
func findMosquitto() (path, version string) {
	for _, p := range []string{"mosquitto", "/usr/sbin/mosquitto"} {
		path, err := exec.LookPath(p)
		if err != nil {
			continue
		}
		out, _ := exec.Command(path, "-h").CombinedOutput() // exits with 3
		if m := versionPattern.FindSubmatch(out); m != nil {
			return path, string(m[1])
		}
	}
	return "", ""
}

// onDisk refuses a folder in memory: what is synced there costs nothing.
func onDisk(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return err
	}
	if st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC {
		return fmt.Errorf("%s is in memory, where a sync costs nothing: give --dir on a disk", dir)
	}
	return nil
}

// moreFiles raises the bound on open files, ours and that of the brokers we start.
func moreFiles(want uint64) error {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return err
	}
	if l.Max < want {
		return fmt.Errorf("%d open files are allowed, %d are needed: raise the hard limit (ulimit -Hn)", l.Max, want)
	}
	l.Cur = max(l.Cur, want)
	return unix.Setrlimit(unix.RLIMIT_NOFILE, &l)
}
