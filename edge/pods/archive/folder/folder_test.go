package folder

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what must come.
const patience = 30 * time.Second

func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); !cond(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// lines is a log that a test reads.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// watched is a folder with a script in the import's place, which counts its runs.
type watched struct {
	t       *testing.T
	dir     string
	runs    string // a file with a byte for each
	log     lines
	mu      sync.Mutex
	results []Result
	stop    func()
}

func watchWith(t *testing.T, dir, script string) *watched {
	t.Helper()
	w := &watched{t: t, dir: dir, runs: filepath.Join(t.TempDir(), "runs")}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Watch(ctx, Config{
			Dir: dir, Command: []string{"sh", "-c", "printf x >>\"$1\"; " + script, "sh", w.runs},
			Done: func(r Result) {
				w.mu.Lock()
				defer w.mu.Unlock()
				w.results = append(w.results, r)
			},
			Logger: slog.New(slog.NewTextHandler(&w.log, nil)),
		})
	}()
	w.stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(w.stop)
	return w
}

func (w *watched) ran() int {
	b, err := os.ReadFile(w.runs)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		w.t.Error(err)
	}
	return len(b)
}

func (w *watched) all() []Result {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.results)
}

func (w *watched) put(name string) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), []byte("x"), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func TestArchives(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"a.tar", "b.tar.gz", "c.tgz", "d.tar.zst", "e.tar.part", ".f.tar", "tar", "readme"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "g.tar"), 0o700); err != nil {
		t.Fatal(err)
	}
	got, err := Archives(dir)
	if err != nil || !slices.Equal(got, []string{"a.tar", "b.tar.gz", "c.tgz", "d.tar.zst"}) {
		t.Errorf("got %q, %v", got, err)
	}
}

func TestProgram(t *testing.T) {
	beside, path := t.TempDir(), t.TempDir()
	t.Setenv("PATH", path)
	if got, err := program(beside); err == nil || !strings.Contains(err.Error(), "install it in "+beside) {
		t.Errorf("missing: got %q, %v", got, err)
	}
	for _, dir := range []string{path, beside} { // the one beside is preferred
		want := filepath.Join(dir, "fairlead-images")
		if err := os.WriteFile(want, nil, 0o700); err != nil {
			t.Fatal(err)
		}
		if got, err := program(beside); got != want || err != nil {
			t.Errorf("got %q, %v; want %q", got, err, want)
		}
	}
}

func TestWatch(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "images")
	w := watchWith(t, dir, `echo '{"file":"a.tar","images":["x:1","x:2"]}{"file":"b.tar","error":"bad archive"}'`)
	eventually(t, "the folder is made", func() bool { _, err := os.Stat(dir); return err == nil })
	w.put("b.tar.part") // still being copied
	w.put("a.tar")
	eventually(t, "both results", func() bool { return len(w.all()) >= 2 })
	if got := w.all(); !slices.Equal(got[0].Images, []string{"x:1", "x:2"}) || got[1].File != "b.tar" || got[1].Error != "bad archive" {
		t.Errorf("got %v", got)
	}
	n := w.ran()
	if err := os.Rename(filepath.Join(dir, "b.tar.part"), filepath.Join(dir, "b.tar")); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another run", func() bool { return w.ran() > n })
	n = w.ran()
	for _, name := range []string{"a.tar", "b.tar"} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a run that unpins what was taken away", func() bool { return w.ran() > n })
}

// TestEmpty wants no process where there is nothing to do.
func TestEmpty(t *testing.T) {
	w := watchWith(t, t.TempDir(), "true")
	w.put("readme")
	time.Sleep(3 * settle) // what must not come has no event
	w.stop()
	if n := w.ran(); n != 0 {
		t.Errorf("%d runs for an empty folder", n)
	}
}

func TestPresentAtStart(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.tar"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	w := watchWith(t, dir, "true")
	eventually(t, "a run", func() bool { return w.ran() == 1 })
}

func TestRetry(t *testing.T) {
	retryAfter = 10 * time.Millisecond
	defer func() { retryAfter = 5 * time.Minute }()
	for name, tc := range map[string]struct {
		script, log string
		again       bool
	}{
		"full disk":     {`echo '{"file":"a.tar","error":"no space","retry":true}'`, "", true},
		"away":          {`echo containerd does not answer >&2; exit 1`, "containerd does not answer", true},
		"nonsense":      {`echo nonsense`, "invalid character", true},
		"much nonsense": {`i=0; while [ $i -lt 20000 ]; do echo nonsense; echo lament >&2; i=$((i+1)); done; exit 3`, "exit status 3", true},
		"bad archive":   {`echo '{"file":"a.tar","error":"bad archive"}'`, "", false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "a.tar"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			w := watchWith(t, dir, tc.script)
			defer w.stop() // before retryAfter is set back
			if !tc.again {
				eventually(t, "a result", func() bool { return len(w.all()) == 1 })
				time.Sleep(20 * retryAfter) // what must not come has no event
				if n := w.ran(); n != 1 {
					t.Errorf("%d runs for a bad archive", n)
				}
				return
			}
			eventually(t, "another run", func() bool { return w.ran() > 1 && strings.Contains(w.log.String(), tc.log) })
			w.stop()
			if len(w.log.String()) > 2*w.ran()*maxStderr {
				t.Errorf("%d runs logged %d bytes", w.ran(), len(w.log.String()))
			}
		})
	}
}

// TestFolderGone takes the folder away.
func TestFolderGone(t *testing.T) {
	retryAfter = 10 * time.Millisecond
	defer func() { retryAfter = 5 * time.Minute }()
	w := watchWith(t, t.TempDir(), "true")
	defer w.stop()
	w.put("a.tar")
	eventually(t, "a run", func() bool { return w.ran() > 0 })
	if err := os.RemoveAll(w.dir); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the folder is made again", func() bool { _, err := os.Stat(w.dir); return err == nil })
	n := w.ran()
	w.put("b.tar")
	eventually(t, "a run for the new folder", func() bool { return w.ran() > n })
}

// TestStop ends an import that runs, and waits until it has cleaned up.
func TestStop(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "a.tar"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mark := filepath.Join(t.TempDir(), "cleaned")
	w := watchWith(t, dir, `trap "touch '`+mark+`'; exit 1" TERM; echo '{"file":"begun"}'; while :; do sleep 0.01; done`)
	eventually(t, "it has begun", func() bool { return len(w.all()) == 1 })
	w.stop()
	if _, err := os.Stat(mark); err != nil {
		t.Errorf("the import did not clean up: %v", err)
	}
}
