package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"go.uber.org/goleak"

	"github.com/fairlead-io/fairlead/broker/store"
)

// child names the variable that marks a process started by a test.
const child = "FAIRLEAD_TEST_CHILD"

func TestMain(m *testing.M) {
	if os.Getenv(child) != "" {
		os.Exit(m.Run())
	}
	goleak.VerifyTestMain(m)
}

// alone runs the test in a process of its own and tells whether this is it.
func alone(t *testing.T) bool {
	t.Helper()
	if os.Getenv(child) != "" {
		return true
	}
	out, err := again(t, "1").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
	return false
}

func again(t *testing.T, value string) *exec.Cmd {
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), child+"="+value)
	return cmd
}

func open(t *testing.T, dir string, o store.Options) (*store.Store, string) {
	t.Helper()
	s, aside, err := store.Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, s) })
	return s, aside
}

var closedOnce sync.Map

func closed(t *testing.T, s *store.Store) {
	t.Helper()
	if _, did := closedOnce.LoadOrStore(s, true); did {
		return
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func put(t testing.TB, s *store.Store, rs ...store.Retained) {
	t.Helper()
	b := s.NewBatch()
	for _, r := range rs {
		b.PutRetained(r)
	}
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
}

func all(t *testing.T, s *store.Store) []store.Retained {
	t.Helper()
	var out []store.Retained
	if err := s.EachRetained(func(r store.Retained) error { out = append(out, r); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func TestRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "store")
	s, aside := open(t, dir, store.Options{})
	if aside != "" {
		t.Errorf("set aside: %q", aside)
	}
	one, zero := byte(1), byte(0)
	want := []store.Retained{
		{Topic: "a", Payload: []byte("1")},
		{Topic: "a:b", Payload: []byte{0, 255}, QoS: 2, Expires: 1 << 50},
		{Topic: "a:b/c", Payload: bytes.Repeat([]byte("x"), 1<<20), QoS: 1, Props: store.Props{ContentType: "t", ResponseTopic: "r", CorrelationData: []byte{0}, PayloadFormat: &one, User: [][2]string{{"k", "v"}, {"k", ""}}}},
		{Topic: "b", Payload: []byte("x"), Props: store.Props{PayloadFormat: &zero}},
		{Topic: "ü/+", Payload: []byte("x")},
	}
	put(t, s, want...)
	put(t, s, store.Retained{Topic: "gone", Payload: []byte("x")})
	put(t, s, store.Retained{Topic: "gone"}, store.Retained{Topic: "never"})
	b := s.NewBatch()
	wills := []store.Will{
		{ClientID: "local/x", Topic: "gone", Payload: []byte{0, 1}, QoS: 1, Retain: true, Expiry: 9, Props: store.Props{ContentType: "t"}},
		{ClientID: "local/y"},
	}
	for _, w := range append(wills, store.Will{ClientID: "local/z"}) {
		if err := b.PutWill(w); err != nil {
			t.Fatal(err)
		}
	}
	b.DeleteWill("local/z")
	b.DeleteWill("nobody")
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
	if err := s.NewBatch().Commit(true); err != nil {
		t.Errorf("empty batch: %v", err)
	}
	for range 2 {
		if got := all(t, s); !reflect.DeepEqual(got, want) {
			t.Errorf("got %.300v", fmt.Sprint(got))
		}
		if got, err := s.Wills(); err != nil || !reflect.DeepEqual(got, wills) {
			t.Errorf("got %+v, %v", got, err)
		}
		if s.DiskUsage() == 0 {
			t.Error("no size")
		}
		closed(t, s)
		if s.DiskUsage() == 0 {
			t.Error("no size once closed")
		}
		s, _ = open(t, dir, store.Options{})
	}
	stop := errors.New("stop")
	n := 0
	if err := s.EachRetained(func(store.Retained) error { n++; return stop }); !errors.Is(err, stop) || n != 1 {
		t.Errorf("got %v after %d", err, n)
	}
	if fi, err := os.Stat(dir); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("the folder's mode: %v, %v", fi.Mode(), err)
	}
}

// Each kind of damage is found, the damaged folder is kept under a new name,
// and an empty store is opened.
func TestCorrupt(t *testing.T) {
	for _, c := range []struct {
		name, glob string
		damage     func(b []byte) []byte
	}{
		{"MANIFEST truncated", "MANIFEST-*", func(b []byte) []byte { return b[:len(b)/3] }},
		{"MANIFEST empty", "MANIFEST-*", func([]byte) []byte { return nil }},
		{"MANIFEST garbled", "MANIFEST-*", garble},
		{"MANIFEST missing", "MANIFEST-*", nil},
		{"table truncated", "*.sst", func(b []byte) []byte { return b[:len(b)/2] }},
		{"table empty", "*.sst", func([]byte) []byte { return nil }},
		{"table missing", "*.sst", nil},
		{"table garbled at its end", "*.sst", func(b []byte) []byte { return append(b[:len(b)-60:len(b)-60], garble(b[len(b)-60:])...) }},
		{"log garbled", "*.log", garble},
		{"log missing", "*.log", nil},
		{"OPTIONS garbled", "OPTIONS-*", garble},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "store")
			fill(t, dir)
			files, err := filepath.Glob(filepath.Join(dir, c.glob))
			if err != nil || len(files) == 0 {
				t.Fatalf("no %s", c.glob)
			}
			for _, f := range files {
				if c.damage == nil {
					if err := os.Remove(f); err != nil {
						t.Fatal(err)
					}
					continue
				}
				b, err := os.ReadFile(f)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(f, c.damage(b), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			before, _ := os.ReadDir(dir)
			s, aside, err := store.Open(dir, store.Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer closed(t, s)
			if aside == "" {
				// Damage that shows only when the data is read is reported then.
				var n int
				err := s.EachRetained(func(store.Retained) error { n++; return nil })
				if err != nil {
					if !store.Corrupt(err) {
						t.Errorf("not seen as damage: %v", err)
					}
					return
				}
				if n != filled {
					t.Errorf("%d of %d messages, and nobody was told", n, filled)
				}
				return
			}
			if !strings.HasPrefix(aside, dir+".broken-") {
				t.Errorf("set aside as %q", aside)
			}
			if after, err := os.ReadDir(aside); err != nil || len(after) < len(before)-1 { // CLEAN goes when the store is opened
				t.Errorf("%d of %d files are left, %v", len(after), len(before), err)
			}
			if got := all(t, s); len(got) != 0 {
				t.Errorf("got %d messages", len(got))
			}
			put(t, s, store.Retained{Topic: "a", Payload: []byte("x")})
		})
	}
}

func garble(b []byte) []byte {
	out := bytes.Clone(b)
	for i := range out {
		out[i] ^= byte(0x5a + i)
	}
	return out
}

const filled = 500

// fill makes a store with tables and a log.
func fill(t *testing.T, dir string) {
	t.Helper()
	s, _, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range filled {
		put(t, s, store.Retained{Topic: fmt.Sprintf("t/%03d", i), Payload: bytes.Repeat([]byte{byte(i)}, 5000)})
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// The same for a store that was killed, whose messages are in the log.
func TestKilledLogGarbled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, _ := open(t, dir, store.Options{})
	for i := range 300 {
		put(t, s, store.Retained{Topic: fmt.Sprintf("t/%03d", i), Payload: bytes.Repeat([]byte{byte(i)}, 500)})
	}
	copyOf := filepath.Join(t.TempDir(), "store") // of the running store, as a kill leaves it
	if err := os.CopyFS(copyOf, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	logs, _ := filepath.Glob(filepath.Join(copyOf, "*.log"))
	b, err := os.ReadFile(logs[len(logs)-1])
	if err != nil {
		t.Fatal(err)
	}
	b[10_000] ^= 0xff
	if err := os.WriteFile(logs[len(logs)-1], b, 0o600); err != nil {
		t.Fatal(err)
	}
	after, aside := open(t, copyOf, store.Options{})
	if aside == "" {
		t.Errorf("not set aside, %d messages are left", len(all(t, after)))
	}
}

// The log's torn end, which a power cut leaves, is no damage.
func TestTornLog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, _ := open(t, dir, store.Options{})
	put(t, s, store.Retained{Topic: "a", Payload: []byte("1")})
	copyOf := filepath.Join(t.TempDir(), "store") // of the running store, as a kill leaves it
	if err := os.CopyFS(copyOf, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	logs, _ := filepath.Glob(filepath.Join(copyOf, "*.log"))
	if len(logs) == 0 {
		t.Fatal("no log")
	}
	f, err := os.OpenFile(logs[len(logs)-1], os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.Write(bytes.Repeat([]byte{0x77}, 100))
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	again, aside := open(t, copyOf, store.Options{})
	if aside != "" {
		t.Errorf("set aside as %s", aside)
	}
	if got := all(t, again); len(got) != 1 {
		t.Errorf("got %v", got)
	}
}

func TestInUse(t *testing.T) {
	if dir := os.Getenv(child); dir != "" { // the other process
		_, _, err := store.Open(dir, store.Options{})
		if !errors.Is(err, store.ErrInUse) || !strings.Contains(err.Error(), "another process") {
			t.Errorf("got %v", err)
		}
		return
	}
	dir := t.TempDir()
	s, _ := open(t, dir, store.Options{})
	put(t, s, store.Retained{Topic: "a", Payload: []byte("1")})
	if _, _, err := store.Open(dir, store.Options{}); !errors.Is(err, store.ErrInUse) {
		t.Errorf("same process: %v", err)
	}
	if out, err := again(t, dir).CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if got := all(t, s); len(got) != 1 {
		t.Errorf("got %v", got)
	}
	if left, _ := filepath.Glob(dir + ".broken-*"); len(left) != 0 {
		t.Errorf("set aside: %v", left)
	}
}

func TestNewer(t *testing.T) {
	dir := t.TempDir()
	s, _ := open(t, dir, store.Options{})
	closed(t, s)
	setFormat(t, dir, []byte{store.Format + 1})
	_, _, err := store.Open(dir, store.Options{})
	if !errors.Is(err, store.ErrNewer) || !strings.Contains(err.Error(), fmt.Sprint("format ", store.Format+1)) {
		t.Errorf("got %v", err)
	}
	if left, _ := filepath.Glob(dir + ".broken-*"); len(left) != 0 {
		t.Errorf("set aside: %v", left)
	}
	setFormat(t, dir, []byte{0x80}) // not a number
	_, aside := open(t, dir, store.Options{})
	if aside == "" {
		t.Error("not set aside")
	}
}

func setFormat(t *testing.T, dir string, v []byte) {
	t.Helper()
	db, err := pebble.Open(dir, &pebble.Options{FormatMajorVersion: pebble.FormatNewest, Logger: quiet{}})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Set([]byte("f"), v, pebble.Sync), db.Close()); err != nil {
		t.Fatal(err)
	}
	_ = os.Remove(filepath.Join(dir, "CLEAN"))
}

type quiet struct{}

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(f string, a ...any) {
	panic(fmt.Sprintf(f, a...))
}

// What the operator can mend is an error that says so, and moves nothing.
func TestCannotOpen(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := store.Open(filepath.Join(file, "store"), store.Options{}); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("got %v", err)
	}
	dir := filepath.Join(t.TempDir(), "store")
	fill(t, dir)
	denied := func(t *testing.T) {
		t.Helper()
		_, _, err := store.Open(dir, store.Options{})
		if !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), dir) {
			t.Errorf("got %v", err)
		}
		if left, _ := filepath.Glob(dir + ".broken-*"); len(left) != 0 {
			t.Errorf("set aside: %v", left)
		}
	}
	if os.Getuid() != 0 {
		if err := os.Chmod(dir, 0o500); err != nil {
			t.Fatal(err)
		}
		denied(t)
		_ = os.Chmod(dir, 0o700)
	} else {
		// Root may do everything; nobody, on a thread of its own, may not.
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			if err := syscall.Setfsuid(65534); err != nil {
				t.Error(err)
			}
			denied(t)
		}()
		<-done
	}
	s, aside := open(t, dir, store.Options{})
	if aside != "" || len(all(t, s)) != filled {
		t.Error("lost")
	}
}

// No error of the operating system passes for damage.
func TestSystemTroubleIsNoDamage(t *testing.T) {
	for _, errno := range []syscall.Errno{syscall.ENOSPC, syscall.EIO, syscall.EMFILE, syscall.EINVAL, syscall.EROFS, syscall.EACCES} {
		if store.Corrupt(fmt.Errorf("open: %w", &os.PathError{Op: "open", Path: "MANIFEST-000001", Err: errno})) {
			t.Error(errno)
		}
	}
}

func TestReserve(t *testing.T) {
	s, _ := open(t, t.TempDir(), store.Options{ReserveBytes: 1 << 60})
	b := s.NewBatch()
	b.PutRetained(store.Retained{Topic: "a", Payload: []byte("x")})
	if err := b.Commit(true); !errors.Is(err, store.ErrDiskFull) || !errors.Is(s.Err(), store.ErrDiskFull) {
		t.Errorf("got %v, %v", err, s.Err())
	}
	if err := s.NewBatch().Commit(true); err != nil {
		t.Errorf("an empty batch needs no room: %v", err)
	}
	if got := all(t, s); len(got) != 0 {
		t.Errorf("got %v", got)
	}
}

// A store that fails refuses everything from then on, and the process lives.
func TestFailed(t *testing.T) {
	if !alone(t) {
		return
	}
	for _, c := range []struct {
		name string
		only string // in the path
	}{{"log", ".log"}, {"manifest", "MANIFEST"}, {"everything", ""}} {
		t.Run(c.name, func(t *testing.T) {
			var broken atomic.Bool
			mem := vfs.NewMem()
			fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
				if broken.Load() && op.Kind.ReadOrWrite() == errorfs.OpIsWrite && strings.Contains(op.Path, c.only) {
					return syscall.EIO
				}
				return nil
			}))
			s, _, err := store.Open("/store", store.Options{FS: fs, MemTableBytes: 64 << 10})
			if err != nil {
				t.Fatal(err)
			}
			put(t, s, store.Retained{Topic: "before", Payload: []byte("x")})
			broken.Store(true)
			acked := 0
			for s.Err() == nil { // a manifest is written by a flush only
				b := s.NewBatch()
				b.PutRetained(store.Retained{Topic: fmt.Sprint("t/", acked), Payload: make([]byte, 10<<10)})
				err := b.Commit(true)
				if err == nil {
					acked++
				} else if !errors.Is(err, store.ErrFailed) {
					t.Fatalf("got %v", err)
				}
				if acked > 10000 {
					t.Fatal("never failed")
				}
			}
			b := s.NewBatch()
			b.PutRetained(store.Retained{Topic: "after", Payload: []byte("x")})
			if err := b.Commit(true); !errors.Is(err, store.ErrFailed) {
				t.Errorf("got %v", err)
			}
			s.DiskUsage()
			if err := s.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		})
	}
	// Opening on such a disk is an error as well.
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind.ReadOrWrite() == errorfs.OpIsWrite && strings.Contains(op.Path, "MANIFEST") {
			return syscall.EIO
		}
		return nil
	}))
	if _, _, err := store.Open("/store", store.Options{FS: fs}); err == nil {
		t.Error("opened")
	}
}

// A flush that fails stops further writes until one succeeds.
func TestFlushRecovers(t *testing.T) {
	if !alone(t) {
		return
	}
	var broken atomic.Bool
	var tries atomic.Int32
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if broken.Load() && op.Kind == errorfs.OpCreate && strings.HasSuffix(op.Path, ".sst") {
			tries.Add(1)
			return syscall.ENOSPC
		}
		return nil
	}))
	s, _, err := store.Open("/store", store.Options{FS: fs, MemTableBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	broken.Store(true)
	n := 0
	write := func() error {
		b := s.NewBatch()
		b.PutRetained(store.Retained{Topic: fmt.Sprint("t/", n), Payload: make([]byte, 10<<10)})
		return b.Commit(true)
	}
	for err = write(); err == nil; err = write() {
		n++
	}
	if !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("got %v", err)
	}
	broken.Store(false)
	for s.Err() != nil {
		runtime.Gosched()
	}
	if err := write(); err != nil {
		t.Error(err)
	}
	n++
	if got := all(t, s); len(got) != n {
		t.Errorf("%d messages, %d were acknowledged", len(got), n)
	}
	closed(t, s)
}

func FuzzDecode(f *testing.F) {
	f.Add("a", []byte{1, 0, 0, 0, 'x'})
	f.Add("a", []byte{1, 1, 0x80, 1, 2, '{', '}', 'x'})
	f.Add("a", []byte{1, 1, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 'x'})
	f.Add("", []byte{})
	f.Fuzz(func(t *testing.T, topic string, v []byte) {
		r, err := store.DecodeRetained(topic, v)
		if err != nil {
			if !store.Corrupt(err) {
				t.Errorf("not seen as damage: %v", err)
			}
			return
		}
		again, err := store.DecodeRetained(topic, store.EncodeRetained(r))
		if err != nil || !reflect.DeepEqual(r, again) {
			t.Errorf("%+v became %+v, %v", r, again, err)
		}
	})
}

func FuzzRoundTrip(f *testing.F) {
	f.Add("a/b", []byte("x"), byte(1), int64(0), "text/plain", "re", []byte{1}, "k", "v")
	f.Add("", []byte{}, byte(0), int64(1<<62), "", "", []byte(nil), "", "")
	f.Fuzz(func(t *testing.T, topic string, payload []byte, qos byte, exp int64, ct, re string, cd []byte, k, v string) {
		if exp < 0 || len(payload) == 0 {
			return // never stored: an empty payload clears its topic
		}
		in := store.Retained{Topic: topic, Payload: payload, QoS: qos, Expires: exp, Props: store.Props{
			ContentType: strings.ToValidUTF8(ct, "?"), ResponseTopic: strings.ToValidUTF8(re, "?"), CorrelationData: cd,
			User: [][2]string{{strings.ToValidUTF8(k, "?"), strings.ToValidUTF8(v, "?")}},
		}}
		if len(cd) == 0 {
			in.Props.CorrelationData = nil
		}
		out, err := store.DecodeRetained(topic, store.EncodeRetained(in))
		if err != nil || !reflect.DeepEqual(in, out) {
			t.Errorf("%+v became %+v, %v", in, out, err)
		}
	})
}
