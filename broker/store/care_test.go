package store_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/fairlead-io/fairlead/broker/store"
)

// records gives what a store holds, as dump shows it.
func records(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	err := store.Dump(dir, "", "", func(r store.Record) error {
		b, err := json.Marshal(r)
		out[r.Space+" "+r.Key] = string(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// plantStore makes a closed store of tables, levels and a log: 2,000 readings,
// a Will, and something that was deleted.
func plantStore(t *testing.T, dir string) {
	t.Helper()
	s, _, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fillPlant(t, s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

const readings = 2000

func fillPlant(t *testing.T, s *store.Store) {
	t.Helper()
	var rs []store.Retained
	for i := range readings {
		rs = append(rs, store.Retained{Topic: fmt.Sprintf("fl/n/reported/twin/default/dev-%02d/p-%02d", i/100, i%100), QoS: 1, Payload: fmt.Appendf(nil, `{"v":%d,"t":%d}`, i*7919, 1790000000000+i*31)})
	}
	if err := s.Checkpoint(rs); err != nil {
		t.Fatal(err)
	}
	put(t, s, store.Retained{Topic: "gone", Payload: []byte("x")})
	if err := store.Flush(s); err != nil {
		t.Fatal(err)
	}
	put(t, s, store.Retained{Topic: "gone"}, store.Retained{Topic: "raw", Payload: []byte{0xff, 0}})
	b := s.NewBatch()
	if err := b.PutWill(store.Will{ClientID: "local/x", Topic: "w", Payload: []byte("bye"), QoS: 1}); err != nil {
		t.Fatal(err)
	}
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
}

func TestBackup(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "store")
	s, _ := open(t, dir, store.Options{})
	fillPlant(t, s)
	nosync := s.NewBatch()
	nosync.PutRetained(store.Retained{Topic: "unsynced", Payload: []byte("x")})
	if err := nosync.Commit(false); err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	busy := &during{w: &b, do: func() { // the store works on, and refuses a second backup
		put(t, s, store.Retained{Topic: "later", Payload: []byte("x")})
		if err := s.Backup(io.Discard, ""); !errors.Is(err, store.ErrBackupRunning) {
			t.Errorf("a second backup: %v", err)
		}
	}}
	if err := s.Backup(busy, "plant-7"); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(dir + ".*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	m, err := store.VerifyBackup(bytes.NewReader(b.Bytes()))
	if err != nil || m.Node != "plant-7" || m.Time.IsZero() || len(m.Files) < 4 {
		t.Errorf("got %+v, %v", m, err)
	}
	to := filepath.Join(root, "a", "b")
	if _, err := store.Restore(bytes.NewReader(b.Bytes()), to); err != nil {
		t.Fatal(err)
	}
	closed(t, s)
	want, got := records(t, dir), records(t, to)
	delete(want, "retained later")
	if !maps.Equal(got, want) || len(got) != readings+4 {
		t.Errorf("%d records, want %d", len(got), len(want))
	}
	if _, err := store.Restore(bytes.NewReader(b.Bytes()), to); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("into a store: %v", err)
	}
	if rep, err := store.Check(to, nil); err != nil || len(rep.Damage) > 0 {
		t.Errorf("got %+v, %v", rep, err)
	}
	again, aside := open(t, to, store.Options{})
	if aside != "" || len(all(t, again)) != readings+2 {
		t.Errorf("set aside: %q, %d messages", aside, len(all(t, again)))
	}

	var c bytes.Buffer
	if err := store.BackupClosed(dir, &c, "plant-7"); err != nil {
		t.Fatal(err)
	}
	to2 := filepath.Join(root, "c")
	if err := os.Mkdir(to2, 0o700); err != nil { // empty is as good as none
		t.Fatal(err)
	}
	if _, err := store.Restore(&c, to2); err != nil {
		t.Fatal(err)
	}
	if got := records(t, to2); !maps.Equal(got, records(t, dir)) {
		t.Errorf("%d records", len(got))
	}
	if err := store.BackupClosed(to, io.Discard, ""); !errors.Is(err, store.ErrInUse) {
		t.Errorf("of an open store: %v", err)
	}
	if err := s.Backup(io.Discard, ""); err == nil {
		t.Error("of a closed store")
	}
	if err := again.Backup(brokenPipe{}, ""); !errors.Is(err, errPipe) {
		t.Errorf("to nobody: %v", err)
	}
	if left, _ := filepath.Glob(to + ".*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// during runs do at the first write.
type during struct {
	w  io.Writer
	do func()
}

func (d *during) Write(b []byte) (int, error) {
	if d.do != nil {
		d.do()
		d.do = nil
	}
	return d.w.Write(b)
}

var errPipe = errors.New("broken pipe")

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, errPipe }

// The start removes what a killed backup left, and nothing else.
func TestBackupKilled(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	for _, name := range []string{dir + ".backup-in-progress", dir + ".backup"} {
		if err := os.MkdirAll(filepath.Join(name, "x"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	open(t, dir, store.Options{})
	if left, _ := filepath.Glob(dir + ".*"); !slices.Equal(left, []string{dir + ".backup"}) {
		t.Errorf("left: %v", left)
	}
}

func TestBackupDiskFull(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, _ := open(t, dir, store.Options{ReserveBytes: 1 << 60})
	if err := s.Backup(io.Discard, ""); !errors.Is(err, store.ErrDiskFull) {
		t.Errorf("got %v", err)
	}
}

// A backup that is cut off, damaged, changed or no backup at all is refused, and
// nothing is left of the attempt.
func TestRestoreRefuses(t *testing.T) {
	root := t.TempDir()
	plantStore(t, filepath.Join(root, "store"))
	var buf bytes.Buffer
	if err := store.BackupClosed(filepath.Join(root, "store"), &buf, "n"); err != nil {
		t.Fatal(err)
	}
	good := buf.Bytes()
	edit := func(fn func(h *tar.Header, b []byte) (*tar.Header, []byte)) []byte {
		var out bytes.Buffer
		r, w := tar.NewReader(bytes.NewReader(good)), tar.NewWriter(&out)
		for {
			h, err := r.Next()
			if err != nil {
				break
			}
			b, _ := io.ReadAll(r)
			if h, b = fn(h, b); h == nil {
				continue
			}
			h.Size = int64(len(b))
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			_, _ = w.Write(b)
		}
		_ = w.Close()
		return out.Bytes()
	}
	manifest := func(change func(m map[string]any)) []byte {
		return edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if h.Name == "fairlead-backup.json" {
				var m map[string]any
				if err := json.Unmarshal(b, &m); err != nil {
					t.Fatal(err)
				}
				change(m)
				b, _ = json.Marshal(m)
			}
			return h, b
		})
	}
	isTable := func(h *tar.Header) bool { return strings.HasSuffix(h.Name, ".sst") }
	for _, c := range []struct {
		name string
		b    []byte
		want error
	}{
		{"nothing", nil, store.ErrNotBackup},
		{"no tar", []byte("hello"), store.ErrNotBackup},
		{"cut off in a file", good[:2000], store.ErrNotBackup},
		{"cut off before the manifest", edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if h.Name == "fairlead-backup.json" {
				return nil, nil
			}
			return h, b
		}), store.ErrNotBackup},
		{"a bit flipped", edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if isTable(h) {
				b[len(b)/2] ^= 1
			}
			return h, b
		}), store.ErrNotBackup},
		{"a table missing", edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if isTable(h) {
				return nil, nil
			}
			return h, b
		}), store.ErrNotBackup},
		{"a path", edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if isTable(h) {
				h.Name = "../" + h.Name
			}
			return h, b
		}), store.ErrNotBackup},
		{"a link", edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if isTable(h) {
				h.Typeflag, h.Linkname, b = tar.TypeSymlink, "/etc/passwd", nil
			}
			return h, b
		}), store.ErrNotBackup},
		{"a terabyte in a kilobyte", bytes.ReplaceAll(edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if isTable(h) {
				h.Format = tar.FormatPAX
				h.PAXRecords = map[string]string{"XNU.sparse.size": "1000000000000", "XNU.sparse.numblocks": "1", "XNU.sparse.map": "0,0"}
				b = nil
			}
			return h, b
		}), []byte("XNU.sparse"), []byte("GNU.sparse")), store.ErrNotBackup},
		{"a foreign file", edit(func(h *tar.Header, b []byte) (*tar.Header, []byte) {
			if isTable(h) {
				h.Name = "authorized_keys"
			}
			return h, b
		}), store.ErrNotBackup},
		{"a newer backup", manifest(func(m map[string]any) { m["version"] = 2 }), store.ErrNewer},
		{"a newer store", manifest(func(m map[string]any) { m["format"] = 99 }), store.ErrNewer},
		{"no version", manifest(func(m map[string]any) { delete(m, "version") }), store.ErrNotBackup},
	} {
		t.Run(c.name, func(t *testing.T) {
			to := filepath.Join(t.TempDir(), "store")
			if _, err := store.Restore(bytes.NewReader(c.b), to); !errors.Is(err, c.want) {
				t.Errorf("got %v", err)
			}
			if left, _ := os.ReadDir(filepath.Dir(to)); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if errors.Is(c.want, store.ErrNotBackup) {
				if _, err := store.VerifyBackup(bytes.NewReader(c.b)); !errors.Is(err, c.want) {
					t.Errorf("verify: %v", err)
				}
			}
		})
	}
}

// A store that was damaged before its backup was made is not restored as if it
// were sound.
func TestRestoreDamaged(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "store")
	plantStore(t, dir)
	damageTable(t, dir)
	var b bytes.Buffer
	if err := store.BackupClosed(dir, &b, "n"); err != nil {
		t.Fatal(err)
	}
	if _, err := store.Restore(&b, filepath.Join(root, "to")); err == nil || !store.Corrupt(err) {
		t.Errorf("got %v", err)
	}
}

// damageTable flips a byte in the middle of the greatest table.
func damageTable(t *testing.T, dir string) (name string) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(dir, "*.sst"))
	var most int64
	for _, f := range files {
		if fi, err := os.Stat(f); err == nil && fi.Size() > most {
			name, most = f, fi.Size()
		}
	}
	change(t, name, func(b []byte) []byte { b[len(b)/2] ^= 0x55; return b })
	return filepath.Base(name)
}

func change(t *testing.T, path string, fn func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, fn(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

func glob(t *testing.T, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(pattern)
	if err != nil || len(files) == 0 {
		t.Fatalf("no %s", pattern)
	}
	return files[len(files)-1]
}

func TestCheckSound(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	plantStore(t, dir)
	before := names(t, dir)
	calls := 0
	rep, err := store.Check(dir, func(int) { calls++ })
	if err != nil || len(rep.Damage) != 0 || rep.Format != store.Format || rep.Tables == 0 || rep.TableBytes == 0 {
		t.Errorf("got %+v, %v", rep, err)
	}
	if want := map[string]int{"format": 1, "retained": readings + 1, "wills": 1}; !maps.Equal(rep.Records, want) {
		t.Errorf("got %v", rep.Records)
	}
	if after := names(t, dir); !slices.Equal(before, after) {
		t.Errorf("%v became %v", before, after)
	}
	if _, aside := open(t, dir, store.Options{}); aside != "" {
		t.Error("the check changed the store")
	}
	if _, err := store.Check(dir, nil); !errors.Is(err, store.ErrInUse) || !strings.Contains(err.Error(), "backup") {
		t.Errorf("of an open store: %v", err)
	}
	for _, d := range []string{filepath.Join(dir, "none"), t.TempDir()} {
		if _, err := store.Check(d, nil); err == nil || !strings.Contains(err.Error(), "DATA/store") {
			t.Errorf("of no store: %v", err)
		}
	}
}

func names(t *testing.T, dir string) (out []string) {
	t.Helper()
	es, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range es {
		if e.Name() != "LOCK" {
			out = append(out, e.Name())
		}
	}
	return out
}

// Each kind of damage is found and its place is named; the repair leaves a sound
// store with no record that the old one did not have, keeps the old one, and
// saves at least so many.
func TestCheckAndRepair(t *testing.T) {
	whole := filepath.Join(t.TempDir(), "store")
	plantStore(t, whole)
	want := records(t, whole)
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string) (where string)
		saved  int // records, at least
	}{
		{"a block of a table", damageTable, readings - 200},
		{"two blocks of a table", func(t *testing.T, dir string) string {
			name := damageTable(t, dir)
			change(t, filepath.Join(dir, name), func(b []byte) []byte { b[len(b)/5] ^= 1; return b })
			return name
		}, readings - 400},
		{"the first block", func(t *testing.T, dir string) string {
			name := damageTable(t, dir)
			change(t, filepath.Join(dir, name), func(b []byte) []byte { b[len(b)/2] ^= 0x55; b[100] ^= 1; return b })
			return name
		}, readings - 200},
		{"a table cut off", func(t *testing.T, dir string) string {
			name := damageTable(t, dir)
			change(t, filepath.Join(dir, name), func(b []byte) []byte { return b[:len(b)-10] })
			return name
		}, 1},
		{"a table gone", func(t *testing.T, dir string) string {
			name := damageTable(t, dir)
			_ = os.Remove(filepath.Join(dir, name))
			return "store"
		}, 1},
		{"the manifest", func(t *testing.T, dir string) string {
			change(t, glob(t, filepath.Join(dir, "MANIFEST-*")), garble)
			return "store"
		}, readings + 2},
		{"the manifest gone", func(t *testing.T, dir string) string {
			_ = os.Remove(glob(t, filepath.Join(dir, "MANIFEST-*")))
			return "store"
		}, readings + 2},
		{"a file of no one's", func(t *testing.T, dir string) string {
			change(t, glob(t, filepath.Join(dir, "MANIFEST-*")), func(b []byte) []byte { return append(b, 0) })
			return "CLEAN"
		}, readings + 2},
		{"a record", func(t *testing.T, dir string) string {
			raw(t, dir, "rbad", []byte{9})
			return "retained bad"
		}, readings + 2},
		{"a record of no kind", func(t *testing.T, dir string) string {
			raw(t, dir, "\xfe\x00", []byte{9})
			return "unknown-fe 0x00"
		}, readings + 2},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "store")
			if err := os.CopyFS(dir, os.DirFS(whole)); err != nil {
				t.Fatal(err)
			}
			where := c.damage(t, dir)
			rep, err := store.Check(dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(rep.Damage, func(d store.Damage) bool { return d.Where == where && d.Problem != "" }) {
				t.Errorf("%s is not in %+v", where, rep.Damage)
			}
			before := contents(t, dir)
			got, err := store.Repair(dir, nil)
			if err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(got.Kept, dir+".damaged-") || !maps.Equal(before, contents(t, got.Kept)) {
				t.Errorf("the old store is not kept as it was: %s", got.Kept)
			}
			if rep, err := store.Check(dir, nil); err != nil || len(rep.Damage) > 0 {
				t.Errorf("after the repair: %+v, %v", rep.Damage, err)
			}
			have := records(t, dir)
			for k, v := range have {
				if want[k] != v {
					t.Errorf("%s = %s, was %s", k, v, want[k])
				}
			}
			n := got.Salvaged["retained"] + got.Salvaged["wills"]
			if n < c.saved || n+1 != len(have) {
				t.Errorf("%d saved, %d there: %+v", n, len(have), got)
			}
			if n+1 < len(want) && len(got.Lost) == 0 {
				t.Errorf("%d of %d are saved, and nobody is told: %+v", n, len(want), got)
			}
			t.Logf("%d of %d saved from %v, lost: %v", n, len(want)-1, got.From, got.Lost)
			s, aside := open(t, dir, store.Options{})
			if aside != "" {
				t.Error("set aside")
			}
			put(t, s, store.Retained{Topic: "new", Payload: []byte("x")})
		})
	}
}

// contents are the sizes and bytes of all files but the lock.
func contents(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, n := range names(t, dir) {
		b, err := os.ReadFile(filepath.Join(dir, n))
		if err != nil {
			t.Fatal(err)
		}
		out[n] = string(b)
	}
	return out
}

func raw(t *testing.T, dir, k string, v []byte) {
	t.Helper()
	s, _, err := store.Open(dir, store.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(store.PutRaw(s, []byte(k), v), s.Close()); err != nil {
		t.Fatal(err)
	}
}

// What belongs to sessions is known to check and dump, and a repair keeps it: a
// queued message that a table and a log have is gone once it is removed.
func TestRepairSessions(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, _ := open(t, dir, store.Options{})
	b := s.NewBatch()
	if err := errors.Join(b.PutSession(store.Session{ClientID: "c", Num: 7, Expiry: 60}), b.PutSubscription(7, store.Subscription{Filter: "a/#", QoS: 1})); err != nil {
		t.Fatal(err)
	}
	b.PutReceived(7, 300)
	b.Enqueue(7, &store.Queued{N: 4, QoS: 2, Topic: "a/4", Payload: []byte("x")})
	b.Release(7, 4)
	b.Enqueue(7, &store.Queued{N: 5, QoS: 1, Topic: "a/5", Payload: []byte{0xff}})
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
	killed := filepath.Join(t.TempDir(), "store") // with the log that is about to be a table
	logs := contents(t, dir)
	if err := store.Flush(s); err != nil {
		t.Fatal(err)
	}
	closed(t, s)
	if err := os.CopyFS(killed, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	for name, b := range logs {
		if strings.HasSuffix(name, ".log") {
			if err := os.WriteFile(filepath.Join(killed, name), []byte(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	_ = os.Remove(glob(t, filepath.Join(killed, "MANIFEST-*")))
	want := records(t, dir)
	if got := want["queued 0x00000000000000070000000000000005"]; !strings.Contains(got, `"session":7,"n":5,"topic":"a/5","payload":{"base64":"/w=="}`) {
		t.Errorf("got %s of %v", got, want)
	}
	rep, err := store.Check(dir, nil)
	if err != nil || len(rep.Damage) > 0 || !maps.Equal(rep.Records, map[string]int{"format": 1, "sessions": 1, "subscriptions": 1, "queued": 1, "released": 1, "received": 1}) {
		t.Errorf("got %+v, %v", rep, err)
	}
	if got, err := store.Repair(killed, nil); err != nil || len(got.Dropped) > 0 || !slices.Contains(got.From, "logs") {
		t.Fatalf("got %+v, %v", got, err)
	}
	if got := records(t, killed); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	again, _ := open(t, killed, store.Options{})
	b = again.NewBatch()
	b.Dequeue(7, 5)
	if err := b.Commit(true); err != nil {
		t.Fatal(err)
	}
	if err := store.Flush(again); err != nil {
		t.Fatal(err)
	}
	if err := store.Compact(again); err != nil {
		t.Fatal(err)
	}
	if q, err := again.Queue(7, 0, 10, 1000); err != nil || len(q) != 0 {
		t.Errorf("it is back: %+v, %v", q, err)
	}
}

// What only the log holds is saved from it, up to the damage.
func TestRepairLog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	s, _ := open(t, dir, store.Options{})
	for i := range 300 {
		put(t, s, store.Retained{Topic: fmt.Sprintf("t/%03d", i), Payload: bytes.Repeat([]byte{'a' + byte(i%26)}, 500)})
	}
	put(t, s, store.Retained{Topic: "t/000"})
	killed := filepath.Join(t.TempDir(), "store") // as a kill leaves it
	if err := os.CopyFS(killed, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	change(t, glob(t, filepath.Join(killed, "*.log")), func(b []byte) []byte { b[100_000] ^= 1; return b })
	rep, err := store.Check(killed, nil)
	if err != nil || len(rep.Damage) == 0 {
		t.Fatalf("got %+v, %v", rep, err)
	}
	got, err := store.Repair(killed, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := got.Salvaged["retained"]; n < 150 || n > 210 || len(got.Lost) == 0 {
		t.Errorf("got %+v", got)
	}
	want := records(t, func() string { closed(t, s); return dir }())
	for k, v := range records(t, killed) {
		if want[k] != v && k != "retained t/000" { // its deletion was behind the damage
			t.Errorf("%s = %s, was %s", k, v, want[k])
		}
	}
}

func TestRepairInUse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	open(t, dir, store.Options{})
	if _, err := store.Repair(dir, nil); !errors.Is(err, store.ErrInUse) {
		t.Errorf("got %v", err)
	}
	if left, _ := filepath.Glob(dir + ".*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDump(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "store")
	plantStore(t, dir)
	dump := func(space, prefix string) []string {
		t.Helper()
		var out []string
		if err := store.Dump(dir, space, prefix, func(r store.Record) error {
			b, err := json.Marshal(r)
			out = append(out, string(b))
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return out
	}
	for _, c := range []struct {
		space, prefix string
		want          []string
	}{
		{"format", "", []string{fmt.Sprintf(`{"space":"format","key":"","value":%d}`, store.Format)}},
		{"wills", "", []string{`{"space":"wills","key":"local/x","value":{"topic":"w","payload":"bye","qos":1,"retain":false}}`}},
		{"retained", "raw", []string{`{"space":"retained","key":"raw","value":{"payload":{"base64":"/wA="},"qos":0}}`}},
		{"", "fl/n/reported/twin/default/dev-03/p-07", []string{`{"space":"retained","key":"fl/n/reported/twin/default/dev-03/p-07","value":{"payload":"{\"v\":2431133,\"t\":1790000009517}","qos":1}}`}},
		{"wills", "x", nil},
	} {
		if got := dump(c.space, c.prefix); !slices.Equal(got, c.want) {
			t.Errorf("%s %s: got %v", c.space, c.prefix, got)
		}
	}
	if n := len(dump("", "")); n != readings+3 {
		t.Errorf("%d records", n)
	}
	if err := store.Dump(dir, "nothing", "", nil); err == nil || !strings.Contains(err.Error(), " retained, ") {
		t.Errorf("got %v", err)
	}
}

// The same keys, written over and over, take no more room in the end than at
// the begin.
func TestSizeBounded(t *testing.T) {
	s, _ := open(t, filepath.Join(t.TempDir(), "store"), store.Options{})
	p := newPlant()
	var first, most uint64
	for round := range 120 {
		rs := p.minute()
		if err := s.Checkpoint(rs); err != nil {
			t.Fatal(err)
		}
		if round%4 == 0 {
			if err := asBatch(s, rs[:len(rs)/5]); err != nil {
				t.Fatal(err)
			}
		}
		if round == 20 {
			store.Settle(s)
			first = s.DiskUsage()
		}
		if round > 20 {
			most = max(most, s.DiskUsage())
		}
	}
	store.Settle(s)
	st := s.Stats()
	// Logs and tables that are about to go come and go, a few tables of 0.1 MB
	// each: a store that kept what is overwritten would be at 13 MB.
	if last := s.DiskUsage(); last > 4<<20 {
		t.Errorf("%d bytes after 20 rounds, %d after 120", first, last)
	}
	if st.PutBytes < 50e6 {
		t.Errorf("only %d bytes were put", st.PutBytes)
	}
	t.Logf("%d bytes after 20 rounds, %d at most, %d in the end; %+v", first, most, s.DiskUsage(), st)
}

func TestCollector(t *testing.T) {
	s, _ := open(t, filepath.Join(t.TempDir(), "store"), store.Options{})
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(s)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	if problems, err := promlint.NewWithMetricFamilies(families).Lint(); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	fillPlant(t, s)
	st := s.Stats()
	if st.SizeBytes == 0 || st.PutBytes == 0 || st.Written.WAL == 0 || st.Written.Flush == 0 || st.Written.Checkpoint == 0 || st.WriteAmplification <= 0 {
		t.Errorf("got %+v", st)
	}
	families, err = reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	shown := map[string]int{}
	for _, f := range families {
		shown[f.GetName()] = len(f.GetMetric())
	}
	if want := map[string]int{
		"fairlead_store_size_bytes": 1, "fairlead_store_put_bytes_total": 1,
		"fairlead_store_written_bytes_total": 4, "fairlead_store_write_amplification": 1,
	}; !maps.Equal(shown, want) {
		t.Errorf("got %v", shown)
	}
	if got, err := s.Counts(); err != nil || !maps.Equal(got, map[string]int{"format": 1, "retained": readings + 1, "wills": 1}) {
		t.Errorf("got %v, %v", got, err)
	}
	closed(t, s)
	if after := s.Stats(); after != st {
		t.Errorf("closed: %+v, was %+v", after, st)
	}
	if _, err := s.Counts(); err == nil {
		t.Error("counted a closed store")
	}
}

// No record makes a decoder panic, each that can be decoded can be written as
// JSON, and what cannot is damage.
func FuzzRecord(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "store")
	s, _, err := store.Open(dir, store.Options{})
	if err != nil {
		f.Fatal(err)
	}
	put(f, s, store.Retained{Topic: "a/b", Payload: []byte("x"), QoS: 1, Expires: 1 << 40, Props: store.Props{ContentType: "t", User: [][2]string{{"k", "v"}}}})
	b := s.NewBatch()
	if err := errors.Join(b.PutWill(store.Will{ClientID: "c", Topic: "w", Payload: []byte{0xff}}), b.Commit(true)); err != nil {
		f.Fatal(err)
	}
	if err := store.EachRaw(s, func(k, v []byte) { f.Add(k, v) }); err != nil {
		f.Fatal(err)
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	for _, b := range store.Spaces() {
		f.Add([]byte{b}, []byte{})
		f.Add([]byte{b, 0, 0xff}, []byte{1, 1, 0x80, 1, 2, '{', '}', 'x'})
		f.Add([]byte{b, 0, 0, 0, 0, 0, 0, 0, 9}, []byte(`{}`))
	}
	f.Add([]byte{}, []byte{})
	f.Fuzz(func(t *testing.T, k, v []byte) {
		keep := bytes.Clone(v)
		got, err := store.DecodeRecord(k, v)
		if !bytes.Equal(keep, v) {
			t.Error("the decoder changed the record")
		}
		if err != nil {
			if !store.Corrupt(err) {
				t.Errorf("not seen as damage: %v", err)
			}
			return
		}
		if _, err := json.Marshal(got); err != nil {
			t.Errorf("%+v: %v", got, err)
		}
	})
}

// Topics are stored under keys that keep them apart and in their order.
func FuzzKeys(f *testing.F) {
	f.Add("a", "b")
	f.Add("a", "a/")
	f.Add("", "\x00")
	f.Add("ü/+", "\xff\xff")
	f.Fuzz(func(t *testing.T, a, b string) {
		ka, kb := store.Key('r', a), store.Key('r', b)
		if strings.Compare(a, b) != bytes.Compare(ka, kb) {
			t.Errorf("%q and %q", a, b)
		}
		if !bytes.HasPrefix(ka, []byte("r")) || string(ka[1:]) != a {
			t.Errorf("%q became %q", a, ka)
		}
	})
}

// No file passes for a backup unless it is one.
func FuzzBackup(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "store")
	s, _, err := store.Open(dir, store.Options{})
	if err != nil {
		f.Fatal(err)
	}
	put(f, s, store.Retained{Topic: "a", Payload: []byte("x")})
	var b bytes.Buffer
	if err := errors.Join(s.Backup(&b, "n"), s.Close()); err != nil {
		f.Fatal(err)
	}
	f.Add(b.Bytes())
	f.Add(b.Bytes()[:1000])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := store.VerifyBackup(bytes.NewReader(b))
		if err != nil && !errors.Is(err, store.ErrNotBackup) && !errors.Is(err, store.ErrNewer) {
			t.Errorf("got %v", err)
		}
		if err == nil && m.Bytes() > int64(len(b)) {
			t.Errorf("%d bytes in a backup of %d", m.Bytes(), len(b))
		}
	})
}
