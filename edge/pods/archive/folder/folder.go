package folder

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// retryAfter is when an import is tried again that failed for a reason that may
// pass, such as a full disk. Tests change it.
var retryAfter = 5 * time.Minute

const (
	// settle is how long the folder must be quiet: files often come in groups.
	settle = 200 * time.Millisecond
	// maxStderr bounds what is kept of what the import says.
	maxStderr = 4 << 10
)

// Result is what came of an archive.
type Result struct {
	File   string   `json:"file"` // in the folder
	Images []string `json:"images,omitempty"`
	Error  string   `json:"error,omitempty"`
	// Retry says that the reason of the error may pass.
	Retry bool `json:"retry,omitempty"`
}

// Config configures Watch. All but Logger is required.
type Config struct {
	Dir string // it is created
	// Command imports what is new in Dir and prints a Result, as JSON, for each
	// archive that it has tried: Program with Arguments.
	Command []string
	// Done is told of each; calls do not overlap.
	Done   func(Result)
	Logger *slog.Logger // the default one where it is nil
}

// Program is the command fairlead-images, which stands beside this one.
func Program() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	return program(filepath.Dir(self))
}

func program(dir string) (string, error) {
	const name = "fairlead-images"
	if p := filepath.Join(dir, name); executable(p) {
		return p, nil
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is missing: install it in %s, beside fairlead-edge", name, dir)
	}
	return p, nil
}

func executable(file string) bool {
	_, err := exec.LookPath(file)
	return err == nil
}

// Arguments make Program import what is new in a folder, for Config.Command.
func Arguments(dir, socket string) []string {
	return []string{"import", "--folder", dir, "--socket", socket, "--output", "json"}
}

// suffixes are the names of archives.
var suffixes = []string{".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd"}

// Archives gives the names of the archives in a folder: not what is hidden, or
// named otherwise, as files are while they are copied.
func Archives(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if slices.ContainsFunc(suffixes, func(s string) bool { return strings.HasSuffix(e.Name(), s) }) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Watch imports what is in the folder and what is put there, until ctx ends.
func Watch(ctx context.Context, cfg Config) {
	log := cfg.Logger
	if log == nil {
		log = slog.Default()
	}
	log = log.With("folder", cfg.Dir)
	ran := false // whether there may be images that the folder no longer has
	for {
		err := watch(ctx, cfg, log, &ran)
		if ctx.Err() != nil {
			return
		}
		log.Warn("cannot watch the folder for image archives; will try again", "error", err, "after", retryAfter)
		t := time.NewTimer(retryAfter)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// watch is Watch until something is wrong with the folder.
func watch(ctx context.Context, cfg Config, log *slog.Logger, ran *bool) error {
	changes, stop, err := notify(cfg.Dir)
	if err != nil {
		return err
	}
	defer stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, open := <-changes:
			if !open {
				return errors.New("the folder is gone")
			}
			timer.Reset(settle)
			continue
		case <-timer.C:
		}
		files, err := Archives(cfg.Dir)
		if err != nil {
			return err
		}
		if len(files) == 0 && !*ran {
			continue
		}
		*ran = true
		again, err := run(ctx, cfg)
		if err != nil && ctx.Err() == nil {
			log.Warn("cannot import the archives; will try again", "error", err, "after", retryAfter)
		}
		if again || err != nil {
			timer.Reset(retryAfter)
		}
	}
}

// run imports once. again says that it is worth another try later.
func run(ctx context.Context, cfg Config) (again bool, err error) {
	cmd := exec.CommandContext(ctx, cfg.Command[0], cfg.Command[1:]...)
	// An interrupted import cleans up.
	cmd.Cancel = func() error { return cmd.Process.Signal(unix.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	// Where the agent dies, the next one begins anew.
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGTERM}
	var stderr tail
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return false, err
	}
	if err := cmd.Start(); err != nil {
		return false, err
	}
	dec := json.NewDecoder(out)
	for {
		var r Result
		if err = dec.Decode(&r); err != nil {
			break
		}
		again = again || r.Retry
		cfg.Done(r)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	_, _ = io.Copy(io.Discard, out) // what cannot be decoded must not block it
	if werr := cmd.Wait(); werr != nil {
		err = fmt.Errorf("%w: %s", werr, strings.TrimSpace(string(stderr)))
	}
	return again, err
}

// tail keeps the end of what is written.
type tail []byte

func (t *tail) Write(p []byte) (int, error) {
	*t = append(*t, p...)
	if n := len(*t) - maxStderr; n > 0 {
		*t = append((*t)[:0], (*t)[n:]...)
	}
	return len(p), nil
}

// notify makes a folder, and tells as soon as it happens that files were written,
// moved into it or out of it, however many as one. The channel is closed when the
// folder is gone.
func notify(dir string) (changes <-chan struct{}, stop func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, nil, err
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, nil, err
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CLOSE_WRITE|unix.IN_MOVE|unix.IN_DELETE|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_ONLYDIR); err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	out, done := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(done)
		defer close(out)
		var events [4 << 10]byte
		for {
			if _, err := f.Read(events[:]); err != nil {
				return
			}
			if _, err := os.Lstat(dir); err != nil {
				return
			}
			select {
			case out <- struct{}{}:
			default: // one is enough
			}
		}
	}()
	return out, func() { _ = f.Close(); <-done }, nil
}
