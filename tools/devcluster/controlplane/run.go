package controlplane

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"time"
)

// ErrUsage matches, by errors.Is, the errors that only other options or the
// person at the machine can cure; trying again as before does not.
var ErrUsage = errors.New("wrong options")

type usageError string

func usagef(format string, args ...any) error { return usageError(fmt.Sprintf(format, args...)) }

func (e usageError) Error() string        { return string(e) }
func (e usageError) Is(target error) bool { return target == ErrUsage }

// startTimeout is how long the control plane may take until it is ready. It is
// ready after seconds; the rest is for machines busy with something else.
const startTimeout = 3 * time.Minute

// Options say what [Run] runs.
type Options struct {
	// Dir is the folder of everything, created if missing. Required.
	Dir string
	// Bind is the address of the API server; nil means 127.0.0.1. Any other
	// address than a loopback one is also advertised to pods.
	Bind net.IP
	// Port is the API server's TCP port. 0 means the port of the last run in Dir,
	// or a free one if there is none or it is in use.
	Port int
	// LogFile gets the lines of all components; empty means Dir/log.
	LogFile string
	// Further flags of the components; they win over the flags set here.
	APIServerArgs, ControllerManagerArgs, SchedulerArgs []string
	// Logger gets what a person should see; nil discards it.
	Logger *slog.Logger
	// Ready is called once, when the API server answers, the default namespace and
	// its service account exist. It must not block. May be nil.
	Ready func(Endpoint)
}

// Endpoint is where a running control plane is reached.
type Endpoint struct {
	Kubeconfig string        // path of the administrator's kubeconfig
	Server     string        // https://host:port
	After      time.Duration // from the call of Run until ready
}

// Validate reports what cannot work, matching [ErrUsage].
func (o *Options) Validate() error {
	if o.Dir == "" {
		return usagef("no folder given; pass --dir DIR, a folder that devcluster may fill")
	}
	if o.Port < 0 || o.Port > 65535 {
		return usagef("port %d is outside 0..65535", o.Port)
	}
	return nil
}

// Run runs a control plane until ctx ends, and then returns nil, or until a
// component dies, and then returns why. In both cases no child is left when it
// returns. If the process dies during Run, the kernel kills the children.
func Run(ctx context.Context, opts Options) (err error) {
	begin := time.Now()
	if err := opts.Validate(); err != nil {
		return err
	}
	if opts.Bind == nil {
		opts.Bind = net.IPv4(127, 0, 0, 1)
	}
	if opts.Logger == nil {
		opts.Logger = slog.New(slog.DiscardHandler)
	}
	dir, err := newFolder(opts.Dir, "etcd")
	if err != nil {
		return err
	}
	lock, err := dir.lock(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if opts.LogFile == "" {
		opts.LogFile = dir.path("log")
	}
	logFile, err := openLog(opts.LogFile)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, logFile.Close()) }()

	listener, err := dir.listen(opts.Bind, opts.Port)
	if err != nil {
		return err
	}
	defer listener.Close() // closed below once it is the child's; a second Close only says so
	port := listener.Addr().(*net.TCPAddr).Port
	server := "https://" + net.JoinHostPort(dialIP(opts.Bind).String(), strconv.Itoa(port))
	certs, err := dir.ensurePKI(opts.Bind, time.Now())
	if err != nil {
		return err
	}
	if err := dir.writeConfigs(server, certs); err != nil {
		return err
	}
	client, err := newAdminClient(server, certs)
	if err != nil {
		return err
	}
	defer client.close()
	opts.Logger.Info("starting Kubernetes", "dir", dir.root, "server", server, "log", opts.LogFile)

	// Children are tied to this thread's life (see child.go), so this goroutine
	// keeps it until they are gone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	kids := &children{logger: opts.Logger, log: logFile, logPath: opts.LogFile, workDir: dir.path("run"), lock: lock}
	defer func() {
		// On its way down for another reason: a child that dies meanwhile is no news.
		err = errors.Join(err, kids.stop())
	}()

	start := func() error {
		ctx, cancel := context.WithTimeout(ctx, startTimeout)
		defer cancel()
		etcdReady, err := kids.startEtcd(dir)
		if err != nil {
			return err
		}
		if err := kids.await(ctx, "etcd to be ready", etcdReady); err != nil {
			return err
		}
		if err := kids.startAPIServer(apiServerArgs(dir, opts), listener); err != nil {
			return err
		}
		if err := kids.await(ctx, "the API server to be ready", client.poll("/readyz")); err != nil {
			return err
		}
		if err := kids.start(ControllerManager, controllerManagerArgs(dir, opts)); err != nil {
			return err
		}
		if err := kids.start(Scheduler, schedulerArgs(dir, opts)); err != nil {
			return err
		}
		// Pods need both; the controller manager makes the second.
		return kids.await(ctx, "the default namespace and its service account",
			client.poll("/api/v1/namespaces/default", "/api/v1/namespaces/default/serviceaccounts/default"))
	}
	if err := start(); err != nil {
		if ctx.Err() != nil {
			return nil // asked to stop before it was ready
		}
		return err
	}
	if opts.Ready != nil {
		opts.Ready(Endpoint{Kubeconfig: dir.path("kubeconfig"), Server: server, After: time.Since(begin)})
	}
	if err := kids.await(ctx, "the end", nil); err != nil && ctx.Err() == nil {
		return err
	}
	opts.Logger.Info("stopping Kubernetes", "dir", dir.root)
	return nil
}

// DrainUntilClosed reads r and returns when it ends. Given a pipe whose other
// end is held by another process, it returns when that process has ended,
// however that came about.
func DrainUntilClosed(r io.Reader) {
	_, _ = io.Copy(io.Discard, r) // an error is an end, too
}

// folder is the Dir of [Options], absolute.
type folder struct{ root string }

// newFolder makes a folder with pki, run and further ones in it.
func newFolder(dir string, further ...string) (folder, error) {
	root, err := filepath.Abs(dir)
	if err != nil {
		return folder{}, fmt.Errorf("absolute path of %q: %w", dir, err)
	}
	f := folder{root: root}
	closed := []string{f.path("pki"), f.path("run")}
	for _, d := range further {
		closed = append(closed, f.path(d))
	}
	for _, d := range append([]string{f.root}, closed...) {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return folder{}, fmt.Errorf("create folder: %w; choose a --dir that this user may write", err)
		}
	}
	// The folder may have existed: keys and etcd's socket are safe only if nobody
	// else can enter.
	for _, d := range closed {
		if err := os.Chmod(d, 0o700); err != nil {
			return folder{}, fmt.Errorf("close folder to others: %w; choose a --dir that this user owns", err)
		}
	}
	return f, nil
}

func (f folder) path(elem ...string) string {
	return filepath.Join(append([]string{f.root}, elem...)...)
}

// write replaces a file as a whole: a crash leaves the old one or the new one.
func (f folder) write(content []byte, elem ...string) error {
	name := f.path(elem...)
	tmp := name + ".new"
	if err := os.WriteFile(tmp, content, 0o600); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	// WriteFile leaves the mode of a file that existed.
	if err := errors.Join(os.Chmod(tmp, 0o600), os.Rename(tmp, name)); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// lock takes the folder for this process and its children. The lock lives as
// long as the last of them, so a new run cannot meet the etcd of one that was
// just killed.
func (f folder) lock(ctx context.Context) (*os.File, error) {
	name := f.path("lock")
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			break
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w; choose a --dir on a local file system", name, err)
		}
		owner := lockOwner(file)
		if owner == 0 || syscall.Kill(owner, 0) == nil {
			file.Close()
			return nil, usagef("%s is in use by another devcluster (process %d); stop it with: kill %d; or choose another --dir", f.root, owner, owner)
		}
		// Its owner was killed and the kernel is about to end the children.
		select {
		case <-ctx.Done():
			file.Close()
			return nil, fmt.Errorf("lock %s: held by children of process %d, which is gone; end the processes that fuser names for that file", name, owner)
		case <-time.After(20 * time.Millisecond):
		}
	}
	if err := errors.Join(file.Truncate(0), writeAt(file, strconv.Itoa(os.Getpid())+"\n")); err != nil {
		file.Close()
		return nil, fmt.Errorf("write own process id into %s: %w", name, err)
	}
	return file, nil
}

func writeAt(file *os.File, s string) error {
	_, err := file.WriteAt([]byte(s), 0)
	return err
}

// lockOwner is the process id in the lock file, 0 if there is none (yet).
func lockOwner(file *os.File) int {
	b, err := io.ReadAll(io.NewSectionReader(file, 0, 32))
	if err != nil {
		return 0
	}
	var pid int
	if _, err := fmt.Sscan(string(b), &pid); err != nil || pid < 1 {
		return 0
	}
	return pid
}

// state is what a run leaves for the next one.
type state struct {
	Port int `json:"port"`
}

// listen opens the API server's port: the one wanted, else the one of the last
// run so that kubeconfigs that were copied stay right, else a free one.
func (f folder) listen(bind net.IP, port int) (*net.TCPListener, error) {
	network := "tcp"
	if bind.To4() != nil {
		network = "tcp4"
	}
	open := func(port int) (*net.TCPListener, error) {
		return net.ListenTCP(network, &net.TCPAddr{IP: bind, Port: port})
	}
	wanted := port
	var last state
	if b, err := os.ReadFile(f.path("state.json")); err == nil && json.Unmarshal(b, &last) == nil && wanted == 0 {
		port = last.Port
	}
	l, err := open(port)
	if errors.Is(err, syscall.EADDRINUSE) && wanted == 0 && port != 0 {
		l, err = open(0)
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, usagef("port %d of %s is in use by another program; stop it (ss -ltnp shows it), or leave out --port to get a free one", port, bind)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, usagef("this machine has no address %s; give --bind one that ip address shows", bind)
	case err != nil:
		return nil, fmt.Errorf("listen for the API server: %w", err)
	}
	b, err := json.Marshal(state{Port: l.Addr().(*net.TCPAddr).Port})
	if err == nil {
		err = f.write(b, "state.json")
	}
	if err != nil {
		l.Close()
		return nil, fmt.Errorf("remember the port: %w", err)
	}
	return l, nil
}

// maxLog is the size beyond which a start puts the log aside.
const maxLog = 16 << 20

func openLog(name string) (*os.File, error) {
	if info, err := os.Stat(name); err == nil && info.Mode().IsRegular() && info.Size() > maxLog {
		if err := os.Rename(name, name+".old"); err != nil {
			return nil, fmt.Errorf("put the log of earlier runs aside: %w", err)
		}
	}
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w; give --log-file a path that this user may write", err)
	}
	return file, nil
}
