package testregistry

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// Registry is a registry. Its methods may be called from several goroutines.
type Registry struct {
	URL string // http://127.0.0.1:port

	srv    *http.Server
	done   chan struct{}
	active sync.WaitGroup // requests

	mu struct {
		sync.Mutex
		blobs    map[string]blob              // by digest
		tags     map[string]map[string]string // repository → tag → digest
		private  map[string]string            // repository → user:password
		before   func(http.ResponseWriter, Request) bool
		requests []Request
	}
}

type blob struct {
	mediaType string
	body      []byte
}

// Request is a request for a part of an image.
type Request struct {
	Repository string // app, team/app
	Kind       string // manifests or blobs
	Reference  string // tag or digest
	Method     string // HEAD or GET
	User       string // of the credentials that came along; "" is none
	// Done is closed when the client has gone.
	Done <-chan struct{}
}

// Start runs a registry until the test ends.
func Start(t testing.TB) *Registry {
	t.Helper()
	r, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// New runs an empty registry on a free port of 127.0.0.1.
func New() (*Registry, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("testregistry: %w", err)
	}
	r := &Registry{URL: "http://" + l.Addr().String(), done: make(chan struct{})}
	r.mu.blobs, r.mu.tags, r.mu.private = map[string]blob{}, map[string]map[string]string{}, map[string]string{}
	r.srv = &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		defer close(r.done)
		_ = r.srv.Serve(l) // until Close
	}()
	return r, nil
}

// Close ends the registry and what it is sending; its port refuses from then on.
func (r *Registry) Close() {
	_ = r.srv.Close()
	<-r.done
	r.active.Wait()
}

// Push takes an OCI archive with one image, as testruntime.Image makes it, under
// the repository and tag of its name, whatever the name's registry. It gives the
// digest of the manifest.
func (r *Registry) Push(archive []byte) (digest string, err error) {
	files := map[string][]byte{}
	for tr := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			files[h.Name], err = io.ReadAll(tr)
		}
		if err != nil {
			return "", fmt.Errorf("testregistry: read the archive: %w", err)
		}
	}
	var index struct {
		Manifests []struct {
			MediaType, Digest string
			Annotations       map[string]string
		}
	}
	if err := json.Unmarshal(files["index.json"], &index); err != nil || len(index.Manifests) != 1 {
		return "", fmt.Errorf("testregistry: the archive's index.json must have one manifest: %w", err)
	}
	m := index.Manifests[0]
	_, name, _ := strings.Cut(m.Annotations["io.containerd.image.name"], "/")
	repository, tag, ok := strings.Cut(name, ":")
	if !ok {
		return "", fmt.Errorf("testregistry: the image's name must be registry/repository:tag, not %q", m.Annotations["io.containerd.image.name"])
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for path, body := range files {
		if hash, ok := strings.CutPrefix(path, "blobs/sha256/"); ok {
			sum := sha256.Sum256(body)
			if hex.EncodeToString(sum[:]) != hash {
				return "", fmt.Errorf("testregistry: %s has another digest", path)
			}
			r.mu.blobs["sha256:"+hash] = blob{"application/octet-stream", body}
		}
	}
	manifest, ok := r.mu.blobs[m.Digest]
	if !ok {
		return "", fmt.Errorf("testregistry: the archive lacks its manifest %s", m.Digest)
	}
	manifest.mediaType = m.MediaType
	r.mu.blobs[m.Digest] = manifest
	if r.mu.tags[repository] == nil {
		r.mu.tags[repository] = map[string]string{}
	}
	r.mu.tags[repository][tag] = m.Digest
	return m.Digest, nil
}

// Private makes a repository want credentials; an empty user makes it public.
func (r *Registry) Private(repository, user, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if user == "" {
		delete(r.mu.private, repository)
		return
	}
	r.mu.private[repository] = user + ":" + password
}

// Before sets what is called for each request whose credentials are right,
// before it is answered. It may wait, for q.Done at the longest, and it may
// answer itself, which it says. Several calls may run at once.
func (r *Registry) Before(f func(w http.ResponseWriter, q Request) (answered bool)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mu.before = f
}

// Requests gives all requests so far, those that were refused too.
func (r *Registry) Requests() []Request {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]Request(nil), r.mu.requests...)
}

// ServeHTTP answers as a registry.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.active.Add(1)
	defer r.active.Done()
	path, ok := strings.CutPrefix(req.URL.Path, "/v2/")
	if !ok || req.Method != http.MethodGet && req.Method != http.MethodHead {
		http.Error(w, "only /v2/, and only to pull", http.StatusNotFound)
		return
	}
	if path == "" {
		return
	}
	parts := strings.Split(path, "/")
	if len(parts) < 3 {
		http.NotFound(w, req)
		return
	}
	n := len(parts)
	q := Request{Repository: strings.Join(parts[:n-2], "/"), Kind: parts[n-2], Reference: parts[n-1], Method: req.Method, Done: req.Context().Done()}
	user, password, _ := req.BasicAuth()
	q.User = user

	r.mu.Lock()
	r.mu.requests = append(r.mu.requests, q)
	want, private := r.mu.private[q.Repository]
	before := r.mu.before
	r.mu.Unlock()
	if private && want != user+":"+password {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		refuse(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		return
	}
	if before != nil && before(w, q) {
		return
	}
	r.mu.Lock()
	digest := q.Reference
	if d, tagged := r.mu.tags[q.Repository][digest]; q.Kind == "manifests" && tagged {
		digest = d
	}
	b, found := r.mu.blobs[digest]
	if len(r.mu.tags[q.Repository]) == 0 {
		found = false
	}
	r.mu.Unlock()
	if !found {
		refuse(w, http.StatusNotFound, strings.ToUpper(strings.TrimSuffix(q.Kind, "s"))+"_UNKNOWN", "not here")
		return
	}
	w.Header().Set("Content-Type", b.mediaType)
	w.Header().Set("Docker-Content-Digest", digest)
	http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(b.body)) // ranges too
}

// refuse answers with an error of the API.
func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"errors": []any{map[string]string{"code": code, "message": message}}})
}
