package edge

import (
	"errors"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/store"
	"github.com/fairlead-io/fairlead/edge/admin"
)

// serveAdmin serves the admin socket in the data folder until stop is called.
// An agent that cannot have one does its work without.
func serveAdmin(dir string, bus *broker.Broker, log *slog.Logger) (stop func()) {
	s := admin.New(log)
	careForStore(s, bus, log)
	s.Handle("GET /events/backlog", func(w http.ResponseWriter, _ *http.Request) { admin.JSON(w, bus.EventBacklog(), nil) })
	stop, err := s.Serve(filepath.Join(dir, admin.Socket))
	if err != nil {
		log.Error("no admin socket: the store of the running agent cannot be backed up", "error", err)
		return func() {}
	}
	return stop
}

// cared is what the admin socket wants of the broker.
type cared interface {
	Backup(w io.Writer) error
	StoreStats() store.Stats
	StoreCounts() (map[string]int, error)
}

// storeStats is the answer to GET /store/stats.
type storeStats struct {
	store.Stats
	// Records counts them by key space.
	Records map[string]int `json:"records"`
}

// careForStore adds GET /store/backup, a tar as store.Restore reads it, and GET
// /store/stats.
func careForStore(s *admin.Server, bus cared, log *slog.Logger) {
	s.Handle("GET /store/stats", func(w http.ResponseWriter, _ *http.Request) {
		counts, err := bus.StoreCounts()
		admin.JSON(w, storeStats{bus.StoreStats(), counts}, err)
	})
	s.Handle("GET /store/backup", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-tar")
		out := &begun{w: w}
		err := bus.Backup(out)
		switch {
		case err == nil:
			log.Info("store backed up", "bytes", out.bytes)
		case out.bytes > 0:
			log.Warn("backup of the store broke off", "bytes", out.bytes, "error", err)
			panic(http.ErrAbortHandler) // the reader must not take it for the end
		case errors.Is(err, store.ErrBackupRunning):
			admin.Fail(w, http.StatusConflict, err)
		case errors.Is(err, store.ErrDiskFull):
			admin.Fail(w, http.StatusInsufficientStorage, err)
		default:
			admin.Fail(w, http.StatusInternalServerError, err)
		}
	})
}

// begun counts what was written of an answer.
type begun struct {
	w     io.Writer
	bytes int64
}

func (b *begun) Write(p []byte) (int, error) {
	n, err := b.w.Write(p)
	b.bytes += int64(n)
	return n, err
}
