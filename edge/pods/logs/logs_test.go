package logs

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// box is a folder with the log of a container whose runtime the test plays: it
// writes to the file that it has open, whatever its name has become.
type box struct {
	t    *testing.T
	path string
	open *os.File
	err  error // of the runtime
	now  time.Time
	log  bytes.Buffer
	*Rotator
}

func newBox(t *testing.T) *box {
	t.Helper()
	b := &box{t: t, path: filepath.Join(t.TempDir(), "app[1]*", "0.log"), now: time.Date(2026, 11, 22, 23, 59, 58, 0, time.UTC)}
	if err := os.Mkdir(filepath.Dir(b.path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := b.reopen(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.open.Close() })
	var err error
	b.Rotator, err = New(Config{
		Live: func() []Live { return []Live{{"c1", b.path}} },
		Reopen: func(_ context.Context, id string) error {
			if id != "c1" {
				t.Errorf("container %s was asked to reopen its log", id)
			}
			if b.err != nil {
				return b.err
			}
			return b.reopen()
		},
		MaxSize: 10, MaxFiles: 4, Now: func() time.Time { return b.now }, Logger: slog.New(slog.NewTextHandler(&b.log, nil)), Metrics: prometheus.NewRegistry(),
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *box) reopen() (err error) {
	_ = b.open.Close()
	b.open, err = os.OpenFile(b.path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o640)
	return err
}

// say writes, and passes a second.
func (b *box) say(text string) {
	b.t.Helper()
	if _, err := b.open.WriteString(text); err != nil {
		b.t.Fatal(err)
	}
	b.now = b.now.Add(time.Second)
}

func (b *box) look() { b.Look(b.t.Context()) }

// want checks the folder: names after the log's, with what is in the files.
func (b *box) want(want ...string) {
	b.t.Helper()
	entries, err := os.ReadDir(filepath.Dir(b.path))
	if err != nil {
		b.t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		content, err := os.ReadFile(filepath.Join(filepath.Dir(b.path), e.Name()))
		if err != nil {
			b.t.Fatal(err)
		}
		if strings.HasSuffix(e.Name(), ".gz") {
			z, err := gzip.NewReader(bytes.NewReader(content))
			if err == nil {
				content, err = io.ReadAll(z)
			}
			if err != nil {
				b.t.Errorf("%s: %v", e.Name(), err)
			}
		}
		got = append(got, strings.TrimPrefix(e.Name(), "0.log")+"="+string(content))
	}
	if !slices.Equal(got, want) {
		b.t.Errorf("want %q, got %q", want, got)
	}
}

func count(t *testing.T, c prometheus.Counter) float64 {
	t.Helper()
	var m dto.Metric
	if err := c.Write(&m); err != nil {
		t.Fatal(err)
	}
	return m.GetCounter().GetValue()
}

func TestRotation(t *testing.T) {
	b := newBox(t)
	b.say("123456789")
	b.look()
	b.want("=123456789") // too small
	b.say("a")
	b.look()
	b.want("=", ".20261123-000000=123456789a")
	b.say("second one\n")
	b.look()
	b.want("=", ".20261123-000000.gz=123456789a", ".20261123-000001=second one\n")
	b.say("the third one")
	b.look()
	b.want("=", ".20261123-000000.gz=123456789a", ".20261123-000001.gz=second one\n", ".20261123-000002=the third one")
	if files, err := Files(b.path); err != nil || len(files) != 4 || files[0] != b.path+".20261123-000000.gz" || files[3] != b.path {
		t.Errorf("got %q, %v", files, err)
	}
	b.say("the fourth one")
	b.look()
	b.want("=", ".20261123-000001.gz=second one\n", ".20261123-000002.gz=the third one", ".20261123-000003=the fourth one")
	if n := count(t, b.rotated); n != 4 || count(t, b.failed) != 0 {
		t.Errorf("%v rotations", n)
	}
	if info, err := os.Stat(b.path + ".20261123-000001.gz"); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("got %v, %v", info, err)
	}
	// What an interrupted compression has left goes, and is not listed meanwhile.
	for name, content := range map[string]string{".20261123-000003.tmp": "half", ".20261123-000002": "was compressed"} {
		if err := os.WriteFile(b.path+name, []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if files, err := Files(b.path); err != nil || len(files) != 4 {
		t.Errorf("got %q, %v", files, err)
	}
	b.say("the fifth one")
	b.look()
	b.want("=", ".20261123-000002.gz=the third one", ".20261123-000003.gz=the fourth one", ".20261123-000004=the fifth one")

	// Another container's logs are not touched: 0.log is no prefix of them.
	other := filepath.Join(filepath.Dir(b.path), "0.logs")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Remove(b.path); err != nil {
			t.Fatal(err)
		}
		b.want("s=")
	}
}

func TestALogThatIsGoneIsMadeAnew(t *testing.T) {
	b := newBox(t)
	if err := os.Remove(b.path); err != nil {
		t.Fatal(err)
	}
	b.look()
	b.want("=")
}

// TestTheRuntimeDoesNotReopen: the container goes on writing to the file it has.
func TestTheRuntimeDoesNotReopen(t *testing.T) {
	b := newBox(t)
	b.err = errors.New("container is restarting")
	b.say("1234567890")
	for range 3 {
		b.look()
		b.want("=1234567890")
	}
	if n := count(t, b.failed); n != 3 || count(t, b.rotated) != 0 {
		t.Errorf("%v failures", n)
	}
	if n := strings.Count(b.log.String(), "container is restarting"); n != 1 {
		t.Errorf("it was said %d times:\n%s", n, b.log.String())
	}
	b.say("abc")
	b.err = nil
	b.look()
	b.want("=", ".20261123-000000=1234567890abc")
}

func TestTwiceInASecond(t *testing.T) {
	b := newBox(t)
	for _, text := range []string{"first text", "other text"} {
		if _, err := b.open.WriteString(text); err != nil {
			t.Fatal(err)
		}
		b.look()
	}
	b.want("=other text", ".20261122-235958=first text")
	b.say("")
	b.look()
	b.want("=", ".20261122-235958.gz=first text", ".20261122-235959=other text")
}

// TestFullDisk: what cannot be compressed for want of space is rotated all the
// same, and MaxFiles holds.
func TestFullDisk(t *testing.T) {
	b := newBox(t)
	dir := filepath.Dir(b.path)
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=16k"); err != nil {
		t.Skip("wants to mount a tmpfs: ", err)
	}
	t.Cleanup(func() {
		_ = b.open.Close()
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	if err := b.reopen(); err != nil {
		t.Fatal(err)
	}
	b.say("1234567890")
	b.look()
	if err := os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 12<<10), 0o600); err != nil {
		t.Fatal(err) // 16 KiB are four pages: the log has one, this the rest
	}
	names := func() (out []string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			out = append(out, e.Name())
		}
		return out
	}
	// The container's next text takes a page of it; for the compressed copy there
	// is none left.
	if err := os.Truncate(filepath.Join(dir, "fill"), 8<<10); err != nil {
		t.Fatal(err)
	}
	b.say("abcdefghij")
	b.look()
	if want := []string{"0.log", "0.log.20261122-235959", "0.log.20261123-000000", "fill"}; !slices.Equal(names(), want) {
		t.Fatalf("got %q\n%s", names(), b.log.String())
	}
	if !strings.Contains(b.log.String(), "no space left on device") || count(t, b.failed) != 1 {
		t.Errorf("got %s", b.log.String())
	}
	if err := os.Remove(filepath.Join(dir, "fill")); err != nil {
		t.Fatal(err)
	}
	b.say("klmnopqrst")
	b.look()
	b.want("=", ".20261122-235959.gz=1234567890", ".20261123-000000.gz=abcdefghij", ".20261123-000001=klmnopqrst")
}

func TestRunLooksNowAndThen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		looks := 0
		r, err := New(Config{Live: func() []Live { looks++; return nil }, Reopen: func(context.Context, string) error { return nil }})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.Run(ctx) }()
		time.Sleep(35 * time.Second)
		cancel()
		<-done
		if looks != 4 { // at 0, 10, 20 and 30 s
			t.Errorf("%d looks", looks)
		}
	})
}

func TestConfig(t *testing.T) {
	live, reopen := func() []Live { return nil }, func(context.Context, string) error { return nil }
	for i, c := range []Config{
		{}, {Live: live}, {Reopen: reopen}, {Live: live, Reopen: reopen, MaxFiles: 1}, {Live: live, Reopen: reopen, MaxSize: -1},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%d was taken", i)
		}
	}
}

func TestNames(t *testing.T) {
	dir := PodDir("/logs", "default", "pump", "5b0d-1e9c")
	if dir != "/logs/default_pump_5b0d-1e9c" {
		t.Errorf("got %s", dir)
	}
	for _, test := range []struct{ name, want string }{
		{dir, "5b0d-1e9c"}, {"default_pump_5b0d-1e9c", "5b0d-1e9c"}, {"lost+found", ""}, {"a_b", ""}, {"a_b_", ""}, {"a_b_c_d", ""}, {"", ""},
	} {
		if got, ok := PodUID(test.name); string(got) != test.want || ok != (test.want != "") {
			t.Errorf("%s: got %q, %v", test.name, got, ok)
		}
	}
	if got := LinkPath("/links", "default", "pump", "app", "0123abc"); got != "/links/pump_default_app-0123abc.log" {
		t.Errorf("got %s", got)
	}
	if got := filepath.Base(LinkPath("/links", "default", strings.Repeat("p", 200), "app", strings.Repeat("0", 64))); len(got) != 255 || !strings.HasSuffix(got, "000.log") {
		t.Errorf("got %d %s", len(got), got)
	}
}

func TestLink(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "containers", "x.log")
	for i := range 3 {
		to := fmt.Sprintf("/logs/%d.log", max(i, 1))
		if err := Link(link, to); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(link); err != nil || got != to {
			t.Errorf("got %s, %v", got, err)
		}
	}
}
