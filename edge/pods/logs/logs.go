package logs

import (
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	// timeFormat makes the names of rotated logs sort by age.
	timeFormat = "20060102-150405"
	compressed = ".gz"
	temporary  = ".tmp"
)

// Live is the log of a running container.
type Live struct {
	ContainerID string
	Path        string // of the file that the runtime writes
}

// Config says what is rotated. Live and Reopen must be set.
type Config struct {
	// Live gives the logs of the containers that run now.
	Live func() []Live
	// Reopen makes the runtime open the log at its path anew.
	Reopen func(ctx context.Context, containerID string) error
	// MaxSize is the size in bytes from which a log is rotated. Default 10 MiB.
	MaxSize int64
	// MaxFiles is how many files a container may have, the live one included; at
	// least 2, default 5.
	MaxFiles int
	// Every is the time between two looks, default 10 s. A log may grow beyond
	// MaxSize by what is written in between.
	Every   time.Duration
	Logger  *slog.Logger
	Metrics prometheus.Registerer // nil: none
	// Now is the clock that names rotated logs, time.Now if nil.
	Now func() time.Time
}

// Rotator rotates logs.
type Rotator struct {
	cfg     Config
	log     *slog.Logger
	failing map[string]string // by path: the error that was logged last

	rotated, failed prometheus.Counter
}

// New makes a rotator. Run rotates.
func New(cfg Config) (*Rotator, error) {
	if cfg.Live == nil || cfg.Reopen == nil {
		return nil, errors.New("logs: Config needs Live and Reopen")
	}
	if cfg.MaxSize == 0 {
		cfg.MaxSize = 10 << 20
	}
	if cfg.MaxFiles == 0 {
		cfg.MaxFiles = 5
	}
	if cfg.MaxSize < 0 || cfg.MaxFiles < 2 {
		return nil, fmt.Errorf("logs: the size of a log must be more than 0 and its files at least 2, not %d and %d", cfg.MaxSize, cfg.MaxFiles)
	}
	if cfg.Every == 0 {
		cfg.Every = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	r := &Rotator{cfg: cfg, log: cfg.Logger, failing: map[string]string{},
		rotated: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_pods_log_rotations_total", Help: "Container logs that were rotated."}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "fairlead_pods_log_rotation_failures_total", Help: "Container logs that could not be rotated or compressed; they are tried again."}),
	}
	if cfg.Metrics != nil {
		for _, c := range []prometheus.Collector{r.rotated, r.failed} {
			if err := cfg.Metrics.Register(c); err != nil {
				return nil, fmt.Errorf("logs: register metrics: %w", err)
			}
		}
	}
	return r, nil
}

// Run looks after the logs until ctx ends.
func (r *Rotator) Run(ctx context.Context) {
	tick := time.NewTicker(r.cfg.Every)
	defer tick.Stop()
	for {
		r.Look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Look rotates the logs that are due, once, one after the other. It must not run
// beside itself.
func (r *Rotator) Look(ctx context.Context) {
	live := r.cfg.Live()
	seen := make(map[string]struct{}, len(r.failing))
	for _, l := range live {
		if ctx.Err() != nil {
			return
		}
		err := r.look(ctx, l)
		if err == nil || ctx.Err() != nil {
			continue
		}
		r.failed.Inc()
		seen[l.Path] = struct{}{}
		if r.failing[l.Path] != err.Error() { // said once, not every ten seconds
			r.failing[l.Path] = err.Error()
			r.log.Warn("a container's log cannot be rotated or compressed; it is tried again", "container", l.ContainerID, "path", l.Path, "err", err)
		}
	}
	for p := range r.failing {
		if _, still := seen[p]; !still {
			delete(r.failing, p)
		}
	}
}

func (r *Rotator) look(ctx context.Context, l Live) error {
	info, err := os.Stat(l.Path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Somebody removed it: without a new one, what the container says is lost.
		if err := r.cfg.Reopen(ctx, l.ContainerID); err != nil {
			return fmt.Errorf("the log is missing, and the runtime did not open a new one: %w", err)
		}
		return nil
	case err != nil:
		return err
	case info.Size() < r.cfg.MaxSize:
		return nil
	}
	return r.rotate(ctx, l)
}

// rotate makes room for one more file, compresses and rotates.
func (r *Rotator) rotate(ctx context.Context, l Live) error {
	old, err := rotated(l.Path)
	if err != nil {
		return err
	}
	to := l.Path + "." + r.cfg.Now().Format(timeFormat)
	if slices.Contains(old, to) || slices.Contains(old, to+compressed) {
		return nil // twice in a second: at the next look
	}
	// The live log becomes one more, and there will be a new one.
	for len(old) > r.cfg.MaxFiles-2 {
		if err := remove(old[0]); err != nil {
			return err
		}
		old = old[1:]
	}
	// With a full disk nothing can be compressed, but the log must be rotated all
	// the more: only so MaxFiles bounds it.
	var full error
	for _, p := range old {
		if strings.HasSuffix(p, compressed) {
			continue
		}
		if full = compress(p); full != nil {
			break
		}
	}
	if err := os.Rename(l.Path, to); err != nil {
		return err
	}
	if err := r.cfg.Reopen(ctx, l.ContainerID); err != nil {
		// The runtime goes on writing to the renamed file.
		err = fmt.Errorf("the runtime did not open a new log: %w", err)
		if _, exists := os.Lstat(l.Path); errors.Is(exists, fs.ErrNotExist) {
			err = errors.Join(err, os.Rename(to, l.Path))
		}
		return errors.Join(full, err)
	}
	r.rotated.Inc()
	return full
}

// Files gives the files of a container's log from the oldest to the live one at
// path, which need not exist.
func Files(path string) ([]string, error) {
	old, err := inUse(path, func(string) error { return nil })
	if err != nil {
		return nil, err
	}
	return append(old, path), nil
}

// Remove removes a container's log with what was rotated of it.
func Remove(path string) error {
	names, err := siblings(path)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range append(names, path) {
		errs = append(errs, remove(p))
	}
	return errors.Join(errs...)
}

// rotated gives the rotated logs, oldest first, and removes what an interrupted
// compression left.
func rotated(path string) ([]string, error) { return inUse(path, remove) }

// inUse gives the rotated logs, oldest first, and the others to unused.
func inUse(path string, unused func(string) error) ([]string, error) {
	all, err := siblings(path)
	if err != nil {
		return nil, err
	}
	var keep []string
	for _, p := range all {
		// A log that is there twice was compressed whole: the rename comes last but one.
		if strings.HasSuffix(p, temporary) || slices.Contains(all, p+compressed) {
			if err := unused(p); err != nil {
				return nil, err
			}
			continue
		}
		keep = append(keep, p)
	}
	return keep, nil
}

// siblings gives the files path.*, sorted. It does not use a pattern: names of
// folders may look like one.
func siblings(path string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), filepath.Base(path)+".") && !e.IsDir() {
			out = append(out, filepath.Join(filepath.Dir(path), e.Name()))
		}
	}
	return out, nil
}

// compress replaces a log with its compressed copy. Killed in between, there is
// the log, or both.
func compress(path string) (err error) {
	in, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	tmp := path + temporary
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, info.Mode().Perm())
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = out.Close()
			_ = remove(tmp)
			err = fmt.Errorf("compress %s: %w", path, err)
		}
	}()
	z := gzip.NewWriter(out)
	if _, err := io.Copy(z, in); err != nil {
		return err
	}
	if err := z.Close(); err != nil {
		return err
	}
	// The log goes only when its copy is on the disk.
	if err := out.Sync(); err != nil {
		return err
	}
	if err := out.Close(); err != nil {
		return err
	}
	if err := os.Rename(tmp, path+compressed); err != nil {
		return err
	}
	return remove(path)
}

// remove is os.Remove, content if there is nothing.
func remove(path string) error {
	if err := os.Remove(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
