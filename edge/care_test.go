package edge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/edge/admin"
)

// kept is a store where a broker would be.
type kept struct {
	*store.Store
	fail error // after the first bytes
}

func (k kept) Backup(w io.Writer) error {
	if k.fail != nil {
		_, _ = w.Write(make([]byte, 10_000))
		return k.fail
	}
	return k.Store.Backup(w, "n")
}
func (k kept) StoreStats() store.Stats              { return k.Stats() }
func (k kept) StoreCounts() (map[string]int, error) { return k.Counts() }

// adminOf serves a store on an admin socket and gives a client for it.
func adminOf(t *testing.T, k kept) *http.Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), admin.Socket)
	log := slog.New(slog.DiscardHandler)
	s := admin.New(log)
	careForStore(s, k, log)
	stop, err := s.Serve(path)
	if err != nil {
		t.Fatal(err)
	}
	tr := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	t.Cleanup(func() { tr.CloseIdleConnections(); stop() })
	return &http.Client{Transport: tr}
}

func storeOf(t *testing.T, o store.Options) *store.Store {
	t.Helper()
	s, _, err := store.Open(filepath.Join(t.TempDir(), "store"), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func get(t *testing.T, c *http.Client, path string) (status int, body []byte, err error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://agent"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, b, err
}

func TestStoreCare(t *testing.T) {
	s := storeOf(t, store.Options{})
	var rs []store.Retained
	for i := range 5000 {
		rs = append(rs, store.Retained{Topic: fmt.Sprintf("t/%d", i), Payload: []byte("x")})
	}
	if err := s.Checkpoint(rs); err != nil {
		t.Fatal(err)
	}
	c := adminOf(t, kept{Store: s})
	status, b, err := get(t, c, "/store/stats")
	var stats storeStats
	if err != nil || status != 200 || json.Unmarshal(b, &stats) != nil || stats.SizeBytes == 0 || stats.Records["retained"] != 5000 {
		t.Errorf("got %d %s %v", status, b, err)
	}
	status, b, err = get(t, c, "/store/backup")
	if err != nil || status != 200 {
		t.Fatalf("got %d %v", status, err)
	}
	to := filepath.Join(t.TempDir(), "to")
	if m, err := store.Restore(bytes.NewReader(b), to); err != nil || m.Node != "n" {
		t.Errorf("got %+v, %v", m, err)
	}
	for path, want := range map[string]int{"/nothing": 404, "/": 404} {
		if status, _, _ := get(t, c, path); status != want {
			t.Errorf("%s: %d", path, status)
		}
	}
	c = adminOf(t, kept{Store: storeOf(t, store.Options{ReserveBytes: 1 << 60})})
	if status, b, _ := get(t, c, "/store/backup"); status != http.StatusInsufficientStorage || !strings.Contains(string(b), "disk full") {
		t.Errorf("got %d %s", status, b)
	}
}

// A backup that breaks off in the middle does not look like a short one.
func TestBackupBreaksOff(t *testing.T) {
	c := adminOf(t, kept{Store: storeOf(t, store.Options{}), fail: errors.New("the disk is gone")})
	if _, b, err := get(t, c, "/store/backup"); err == nil {
		t.Errorf("%d bytes, and no error", len(b))
	}
}

// The agent's socket is there while it runs, for its owner only.
func TestAdminSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, admin.Socket)
	s := admin.New(slog.New(slog.DiscardHandler))
	stop, err := s.Serve(path)
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	stop()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
}
