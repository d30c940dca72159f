package image

import (
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-io/fairlead/tools/testregistry"
	"github.com/fairlead-io/fairlead/tools/testruntime"
)

const (
	always       = corev1.PullAlways
	ifNotPresent = corev1.PullIfNotPresent
	never        = corev1.PullNever
)

// TestPull is about one runtime and one registry; each test has images of its own.
func TestPull(t *testing.T) {
	s := newSite(t)
	for _, test := range []struct {
		name string
		f    func(*testing.T, *site)
	}{
		{"policies", testPolicies}, {"names", testNames}, {"back-off", testBackoff}, {"credentials", testCredentials},
		{"a bad secret", testBadSecret}, {"access", testAccess}, {"what arrives while it is pulled", testIntent},
		{"serial", testSerial}, {"parallel", testParallel}, {"progress", testProgress}, {"cancelled", testCancelled}, {"failures", testFailures}, {"offline", testOffline},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Cleanup(func() { s.reg.Before(nil) })
			test.f(t, s)
		})
	}
}

func testPolicies(t *testing.T, s *site) {
	a := s.agent(t)
	digest := push(t, s.reg, "fairlead.test/policy:1", "one")
	w := func(p corev1.PullPolicy) workload { return work("u", "fairlead.test/policy:1", p) }

	const lacking = `Container image "fairlead.test/policy:1" is not present with pull policy of Never`
	if e := a.refused(w(never), ErrImageNeverPull); e.Message != lacking || !e.Until.IsZero() {
		t.Errorf("got %+v", e)
	}
	a.wantEvents("Warning ErrImageNeverPull " + lacking)

	one := a.must(w(ifNotPresent))
	img, err := s.cri.ImageStatus(t.Context(), a.specOf("fairlead.test/policy:1"))
	if err != nil {
		t.Fatal(err)
	}
	pulled := `Normal Pulled Successfully pulled image "fairlead.test/policy:1" in T (T including waiting). Image size: ` + itoa(img.Size) + ` bytes.`
	a.wantEvents(`Normal Pulling Pulling image "fairlead.test/policy:1"`, pulled)
	if len(img.RepoDigests) != 1 || img.RepoDigests[0] != "fairlead.test/policy@"+digest {
		t.Errorf("got %q, want the digest %s", img.RepoDigests, digest)
	}

	// The tag moves: only Always sees it.
	push(t, s.reg, "fairlead.test/policy:1", "two")
	asked := manifests(s.reg, "policy")
	for _, p := range []corev1.PullPolicy{ifNotPresent, never, ""} {
		if got := a.must(w(p)); got != one {
			t.Errorf("%q: got another image", p)
		}
		a.wantEvents(`Normal Pulled Container image "fairlead.test/policy:1" already present on machine and can be accessed by the pod`)
	}
	if n := manifests(s.reg, "policy"); n != asked {
		t.Errorf("the registry was asked %d times for an image that is there", n-asked)
	}
	if got := a.must(w(always)); got == one {
		t.Error("Always got the old image")
	}
	a.wantEvents(`Normal Pulling Pulling image "fairlead.test/policy:1"`, pulled)

	// Without a policy, which an API server would set, the tag decides.
	push(t, s.reg, "fairlead.test/policy:latest", "three")
	for range 2 {
		before := manifests(s.reg, "policy")
		a.must(work("u", "fairlead.test/policy", ""))
		if manifests(s.reg, "policy") == before {
			t.Error("an image without a tag and policy was not asked for at the registry")
		}
	}
	if a.id(t, "fairlead.test/policy:latest") == "" {
		t.Error("an image without a tag is not the one tagged latest")
	}
}

func testNames(t *testing.T, s *site) {
	a := s.agent(t)
	digest := push(t, s.reg, "fairlead.test/names:1", "old")
	push(t, s.reg, "fairlead.test/names:1", "new")
	old := a.must(work("u", "fairlead.test/names@"+digest, ifNotPresent))
	if newer := a.must(work("u", "fairlead.test/names:1", ifNotPresent)); newer == old {
		t.Error("the digest and the tag that moved on are the same")
	}
	// A digest beats the tag beside it.
	if got := a.must(work("u", "fairlead.test/names:1@"+digest, always)); got != old {
		t.Error("tag and digest gave another image than the digest")
	}
	a.mu.Lock()
	a.events = nil
	a.mu.Unlock()
	for _, bad := range []string{"", "fairlead.test/Names:1", "fairlead.test/names:", "http://fairlead.test/names", strings.Repeat("0", 64)} {
		e := a.refused(work("u", bad, ifNotPresent), InvalidImageName)
		if !strings.HasPrefix(e.Message, `Failed to apply default image tag "`+bad+`": couldn't parse image name "`+bad+`": `) {
			t.Errorf("%q: got %s", bad, e.Message)
		}
		a.wantEvents("Warning InspectFailed " + e.Message)
	}
}

func testBackoff(t *testing.T, s *site) {
	a := s.agent(t)
	w := work("u", "fairlead.test/absent:1", ifNotPresent)
	const failed = `rpc error: code = NotFound desc = failed to pull and unpack image "fairlead.test/absent:1": failed to resolve reference "fairlead.test/absent:1": fairlead.test/absent:1: not found`
	for i, delay := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
		delay *= time.Second
		e := a.refused(w, ErrImagePull)
		if e.Message != failed || !e.Until.Equal(a.clock.Add(delay)) {
			t.Fatalf("failure %d: want %q and a wait of %v, got %q and %v", i, failed, delay, e.Message, e.Until.Sub(a.clock))
		}
		a.wantEvents(`Normal Pulling Pulling image "fairlead.test/absent:1"`, `Warning Failed Failed to pull image "fairlead.test/absent:1": `+failed)

		until := e.Until
		a.pass(delay - time.Millisecond)
		asked := manifests(s.reg, "absent")
		e = a.refused(w, ImagePullBackOff)
		if want := `Back-off pulling image "fairlead.test/absent:1": ErrImagePull: ` + failed; e.Message != want || !e.Until.Equal(until) {
			t.Errorf("want %q, got %q", want, e.Message)
		}
		a.wantEvents(`Normal BackOff Back-off pulling image "fairlead.test/absent:1"`)
		if n := manifests(s.reg, "absent"); n != asked {
			t.Error("the registry was asked during the back-off")
		}
		a.pass(time.Millisecond)
	}
	// Another pod, and another image of the same pod, wait for nobody.
	a.pass(-time.Millisecond)
	a.refused(work("v", "fairlead.test/absent:1", ifNotPresent), ErrImagePull)
	a.refused(work("u", "fairlead.test/absent:2", ifNotPresent), ErrImagePull)
	a.refused(w, ImagePullBackOff)

	// A success begins anew, so does a long time, so does another life of the pod.
	push(t, s.reg, "fairlead.test/absent:1", "here")
	a.pass(time.Millisecond)
	a.must(w)
	s.reg.Private("absent", "ann", "right")
	w.policy = always
	for _, anew := range []func(){
		func() {},
		func() { a.pass(10*time.Minute + time.Second) },
		func() { a.Forget("u") },
	} {
		anew()
		if e := a.refused(w, ErrImagePull); e.Until.Sub(a.clock) != 10*time.Second {
			t.Errorf("want 10 s, got %v", e.Until.Sub(a.clock))
		}
		a.pass(10 * time.Second)
		if e := a.refused(w, ErrImagePull); e.Until.Sub(a.clock) != 20*time.Second {
			t.Errorf("want 20 s, got %v", e.Until.Sub(a.clock))
		}
	}
	a.Forget("u")
	a.Forget("v")
	if n := len(a.Images.mu.backoffs); n != 0 {
		t.Errorf("%d back-offs of pods that are gone are kept", n)
	}
}

func testCredentials(t *testing.T, s *site) {
	push(t, s.reg, "fairlead.test/team/private:1", "hidden")
	s.reg.Private("team/private", "ann", "right: with:colons")
	right := func(where string) string { return auth(where, "ann", "right: with:colons") }
	cfg := secret("c", "cfg", "")
	cfg.Type, cfg.Data = corev1.SecretTypeDockercfg, map[string][]byte{corev1.DockerConfigKey: []byte(`{` + right("fairlead.test") + `}`)}
	plain := secret("c", "plain", `"fairlead.test":{"username":"ann","password":"right: with:colons"}`)
	opaque := secret("c", "opaque", right("fairlead.test"))
	opaque.Type = corev1.SecretTypeOpaque

	node := filepath.Join(t.TempDir(), "config.json")
	if err := os.WriteFile(node, []byte(`{"auths":{`+right("fairlead.test")+`}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name    string
		secrets []*corev1.Secret
		node    string
		ok      bool
		tried   []string // users, in order
	}{
		{"none", nil, "", false, []string{""}},
		{"the registry's", []*corev1.Secret{secret("a", "a", right("fairlead.test"))}, "", true, []string{"ann"}},
		{"dockercfg", []*corev1.Secret{cfg}, "", true, []string{"ann"}},
		{"not encoded", []*corev1.Secret{plain}, "", true, []string{"ann"}},
		{"as an address", []*corev1.Secret{secret("a", "a", right("https://fairlead.test/v2/"))}, "", true, []string{"ann"}},
		{"any part of the host", []*corev1.Secret{secret("a", "a", right("*.test"))}, "", true, []string{"ann"}},
		{"the repository's", []*corev1.Secret{secret("a", "a", right("fairlead.test/team"))}, "", true, []string{"ann"}},
		{"another registry's", []*corev1.Secret{secret("a", "a", right("other.test"))}, "", false, []string{""}},
		{"another repository's", []*corev1.Secret{secret("a", "a", right("fairlead.test/other"))}, "", false, []string{""}},
		{"no docker secret", []*corev1.Secret{opaque}, "", false, []string{""}},
		{"a wrong one", []*corev1.Secret{secret("a", "a", auth("fairlead.test", "ann", "wrong"))}, "", false, []string{"ann"}},
		{"a wrong one before, as it is more specific", []*corev1.Secret{secret("a", "a", right("fairlead.test")), secret("b", "b", auth("fairlead.test/team", "bob", "wrong"))}, "", true, []string{"bob", "ann"}},
		{"the node's", nil, node, true, []string{"ann"}},
		{"the pod's before the node's", []*corev1.Secret{secret("b", "b", auth("fairlead.test", "bob", "wrong"))}, node, true, []string{"bob", "ann"}},
		{"no file of the node's", nil, node + ".missing", false, []string{""}},
	} {
		t.Run(test.name, func(t *testing.T) {
			a := s.agent(t, func(c *Config) { c.DockerConfig = test.node })
			asked := len(s.reg.Requests())
			_, err := a.ensure(t.Context(), work("u", "fairlead.test/team/private:1", always, test.secrets...))
			var e *Error
			if test.ok != (err == nil) || err != nil && (!errors.As(err, &e) || e.Reason != ErrImagePull) {
				t.Errorf("got %v", err)
			}
			var tried []string
			for _, q := range s.reg.Requests()[asked:] {
				if q.User != "" && (len(tried) == 0 || tried[len(tried)-1] != q.User) {
					tried = append(tried, q.User)
				}
			}
			if strings.Join(tried, " ") != strings.Trim(strings.Join(test.tried, " "), " ") {
				t.Errorf("want the users %q tried, got %q", test.tried, tried)
			}
		})
	}
}

func testBadSecret(t *testing.T, s *site) {
	a := s.agent(t)
	push(t, s.reg, "fairlead.test/bad-secret:1", "x")
	for _, bad := range []string{`"fairlead.test":{"auth":"%"}`, `"fairlead.test":{"auth":"bm9jb2xvbg=="}`, `"fairlead.test":`} {
		w := work("u", "fairlead.test/bad-secret:1", ifNotPresent, secret("a", "registry", bad))
		e := a.refused(w, ErrImagePull)
		if !strings.Contains(e.Message, "default/registry") || strings.Contains(e.Message, "%!") {
			t.Errorf("got %s", e.Message)
		}
	}
	// Whoever has the image needs no credentials.
	a.must(work("u", "fairlead.test/bad-secret:1", ifNotPresent))
	a.must(work("v", "fairlead.test/bad-secret:1", ifNotPresent, secret("a", "registry", `"fairlead.test":`)))
}

func testAccess(t *testing.T, s *site) {
	a := s.agent(t)
	push(t, s.reg, "fairlead.test/access:1", "hidden")
	s.reg.Private("access", "ann", "right")
	const img = "fairlead.test/access:1"
	mine := secret("s1", "mine", auth("fairlead.test", "ann", "right"))
	a.must(work("owner", img, ifNotPresent, mine))

	asked := manifests(s.reg, "access")
	renewed := secret("s1", "mine", auth("fairlead.test", "ann", "renewed"))
	same := secret("s2", "same", auth("fairlead.test", "ann", "right"))
	a.must(work("again", img, ifNotPresent, mine))
	a.must(work("same credentials", img, never, same))
	a.must(work("renewed secret", img, ifNotPresent, renewed))
	if n := manifests(s.reg, "access"); n != asked {
		t.Errorf("the registry was asked by those who may use the image")
	}

	other := secret("s3", "other", auth("fairlead.test", "eve", "wrong"))
	a.refused(work("nobody", img, ifNotPresent), ErrImagePull)
	a.refused(work("eve", img, ifNotPresent, other), ErrImagePull)
	a.Forget("eve")
	a.mu.Lock()
	a.events = nil
	a.mu.Unlock()
	a.refused(work("eve", img, never, other), ErrImageNeverPull)
	a.wantEvents(`Warning ErrImageNeverPull Container image "` + img + `" is not present with pull policy of Never`)

	// Whoever can pull it may use it from then on.
	s.reg.Private("access", "eve", "right now")
	now := secret("s3", "other", auth("fairlead.test", "eve", "right now"))
	a.must(work("eve", img, ifNotPresent, now))
	a.must(work("eve", img, never, now))
	// Pulled without credentials, it is everybody's.
	s.reg.Private("access", "", "")
	a.refused(work("bob", img, never), ErrImageNeverPull)
	a.must(work("bob", img, ifNotPresent))
	a.must(work("bob", img, never))

	// A restarted agent takes it for preloaded, and so is what was imported.
	s.reg.Private("access", "ann", "right")
	s.agent(t).must(work("nobody", img, never))
	a.must(work("nobody", testruntime.Busybox, never))
}

// testIntent: another pod must not use an image in the moment between its
// arrival and the end of its pull.
func testIntent(t *testing.T, s *site) {
	push(t, s.reg, "fairlead.test/intent:1", "hidden")
	s.reg.Private("intent", "ann", "right")
	var a *agent
	var eve error
	a = s.agent(t, func(c *Config) {
		c.Runtime = &afterPull{Runtime: s.cri, f: func() {
			_, eve = a.ensure(t.Context(), work("eve", "fairlead.test/intent:1", never))
		}}
	})
	a.must(work("owner", "fairlead.test/intent:1", ifNotPresent, secret("s1", "mine", auth("fairlead.test", "ann", "right"))))
	var e *Error
	if !errors.As(eve, &e) || e.Reason != ErrImageNeverPull {
		t.Errorf("want ErrImageNeverPull, got %v", eve)
	}
	// What was there before a pull is still everybody's during the next one.
	push(t, s.reg, "fairlead.test/intent-open:1", "open")
	a.must(work("u", "fairlead.test/intent-open:1", always))
	eve = errors.New("was not asked")
	var b *agent
	b = s.agent(t, func(c *Config) { // to which it is preloaded
		c.Runtime = &afterPull{Runtime: s.cri, f: func() {
			_, eve = b.ensure(t.Context(), work("eve", "fairlead.test/intent-open:1", never))
		}}
	})
	b.must(work("u", "fairlead.test/intent-open:1", always))
	if eve != nil {
		t.Error(eve)
	}
}

// afterPull calls f when an image has arrived.
type afterPull struct {
	Runtime
	f func()
}

func (r *afterPull) PullImage(ctx context.Context, spec *imageSpec, auth *authConfig, sandbox *sandboxConfig) (string, error) {
	ref, err := r.Runtime.PullImage(ctx, spec, auth, sandbox)
	r.f()
	return ref, err
}

// hold keeps the blobs of some repositories back. arrived tells which were asked
// for; release lets all go.
func hold(t *testing.T, reg *testregistry.Registry) (arrived func(repository string) bool, release func()) {
	t.Helper()
	var mu sync.Mutex
	here := map[string]bool{}
	open := make(chan struct{})
	reg.Before(func(_ http.ResponseWriter, q testregistry.Request) bool {
		if q.Kind != "blobs" {
			return false
		}
		mu.Lock()
		here[q.Repository] = true
		mu.Unlock()
		select {
		case <-open:
			return false
		case <-q.Done:
			return true
		}
	})
	release = sync.OnceFunc(func() { close(open) })
	t.Cleanup(release)
	return func(r string) bool { mu.Lock(); defer mu.Unlock(); return here[r] }, release
}

func testSerial(t *testing.T, s *site) {
	a := s.agent(t)
	push(t, s.reg, "fairlead.test/serial-1:1", "one")
	push(t, s.reg, "fairlead.test/serial-2:1", "two")
	arrived, release := hold(t, s.reg)
	var all sync.WaitGroup
	all.Go(func() { a.must(work("u", "fairlead.test/serial-1:1", always)) })
	eventually(t, "the first pull", func() bool { return arrived("serial-1") })
	all.Go(func() { a.must(work("v", "fairlead.test/serial-2:1", always)) })
	eventually(t, "the second pull waits", func() bool { return gauge(t, a.waiting) == 1 })
	if manifests(s.reg, "serial-2") != 0 {
		t.Error("the second pull runs beside the first")
	}
	// One that waits can be given up.
	ctx, cancel := context.WithCancel(t.Context())
	all.Go(func() {
		if _, err := a.ensure(ctx, work("w", "fairlead.test/serial-2:1", always)); !errors.Is(err, context.Canceled) {
			t.Errorf("want context.Canceled, got %v", err)
		}
	})
	eventually(t, "the third pull waits", func() bool { return gauge(t, a.waiting) == 2 })
	cancel()
	eventually(t, "the third pull is gone", func() bool { return gauge(t, a.waiting) == 1 })
	release()
	all.Wait()
	if n := gauge(t, a.waiting); n != 0 {
		t.Errorf("%v pulls wait", n)
	}
}

func testParallel(t *testing.T, s *site) {
	a := s.agent(t, func(c *Config) { c.Parallel = 2 })
	for _, n := range []string{"1", "2", "3"} {
		push(t, s.reg, "fairlead.test/parallel-"+n+":1", n)
	}
	arrived, release := hold(t, s.reg)
	var all sync.WaitGroup
	all.Go(func() { a.must(work("u", "fairlead.test/parallel-1:1", always)) })
	all.Go(func() { a.must(work("v", "fairlead.test/parallel-2:1", always)) })
	eventually(t, "two pulls at once", func() bool { return arrived("parallel-1") && arrived("parallel-2") })
	all.Go(func() { a.must(work("w", "fairlead.test/parallel-3:1", always)) })
	eventually(t, "the third pull waits", func() bool { return gauge(t, a.waiting) == 1 })
	if manifests(s.reg, "parallel-3") != 0 {
		t.Error("three pulls run at once")
	}
	release()
	all.Wait()
}

// testProgress: a long pull says how far it is.
func testProgress(t *testing.T, s *site) {
	var parts atomic.Int32
	s.reg.Before(func(w http.ResponseWriter, q testregistry.Request) bool {
		if q.Kind != "blobs" {
			return false
		}
		w.Header().Set("Content-Length", "10000000")
		if parts.Add(1) == 1 {
			_, _ = w.Write(make([]byte, 1<<20)) // containerd stores whole MiB only
		}
		_ = http.NewResponseController(w).Flush()
		<-q.Done
		return true
	})
	for _, test := range []struct {
		fetching func(context.Context) (int64, error)
		want     string
	}{
		{ContainerdFetching(s.rt.Socket), "Normal Pulling Still pulling image \"fairlead.test/progress:1\" after 0s: 1.0 MiB of the parts that are being fetched have arrived"},
		{nil, "Normal Pulling Still pulling image \"fairlead.test/progress:1\" after 0s"},
		{ContainerdFetching("unix://" + filepath.Join(t.TempDir(), "none")), "Normal Pulling Still pulling image \"fairlead.test/progress:1\" after 0s"},
	} {
		a := s.agent(t, func(c *Config) { c.Fetching = test.fetching })
		a.Images.progressFirst = time.Millisecond
		push(t, s.reg, "fairlead.test/progress:1", test.want)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { _, err := a.ensure(ctx, work("u", "fairlead.test/progress:1", always)); done <- err }()
		eventually(t, test.want, func() bool {
			a.mu.Lock()
			defer a.mu.Unlock()
			return slices.Contains(a.events, test.want)
		})
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	}
}

// testCancelled: a pod that is deleted takes its pull along.
func testCancelled(t *testing.T, s *site) {
	a := s.agent(t)
	push(t, s.reg, "fairlead.test/cancelled:1", "big")
	asked := make(chan (<-chan struct{}), 10)
	s.reg.Before(func(_ http.ResponseWriter, q testregistry.Request) bool {
		if q.Kind == "blobs" {
			asked <- q.Done
			<-q.Done
		}
		return q.Kind == "blobs"
	})
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	w := work("u", "fairlead.test/cancelled:1", ifNotPresent)
	go func() { _, err := a.ensure(ctx, w); result <- err }()
	gone := <-asked
	cancel()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("want context.Canceled, got %v", err)
	}
	select {
	case <-gone:
	case <-time.After(patience):
		t.Error("the runtime goes on pulling for nobody")
	}
	a.wantEvents(`Normal Pulling Pulling image "fairlead.test/cancelled:1"`)
	// The next one is not punished.
	s.reg.Before(nil)
	a.must(w)
}

func testFailures(t *testing.T, s *site) {
	a := s.agent(t)
	push(t, s.reg, "fairlead.test/failing:1", "x")
	s.reg.Before(func(w http.ResponseWriter, q testregistry.Request) bool {
		w.WriteHeader(http.StatusForbidden)
		return true
	})
	w := work("u", "fairlead.test/failing:1", ifNotPresent)
	if e := a.refused(w, ErrImagePull); !strings.Contains(e.Message, "403 Forbidden") {
		t.Errorf("got %s", e.Message)
	}
	// A blob that never comes.
	a.pass(10 * time.Second)
	s.reg.Before(func(w http.ResponseWriter, q testregistry.Request) bool {
		if q.Kind != "blobs" {
			return false
		}
		w.Header().Set("Content-Length", "1000000")
		w.WriteHeader(http.StatusOK)
		panic(http.ErrAbortHandler)
	})
	if e := a.refused(w, ErrImagePull); e.Until.Sub(a.clock) != 20*time.Second {
		t.Errorf("got %+v", e)
	}
	s.reg.Before(nil)
	a.pass(20 * time.Second)
	a.must(w)
}

func testOffline(t *testing.T, s *site) {
	reg := testregistry.Start(t)
	s.known(t, "offline.test", reg)
	push(t, reg, "offline.test/app:1", "here")
	stock, ours := s.agent(t), s.agent(t, func(c *Config) { c.UsePresent = true })
	w := work("u", "offline.test/app:1", always)
	want := ours.must(w)
	ours.wantEvents(`Normal Pulling Pulling image "offline.test/app:1"`, ours.events[1])
	reg.Close()

	e := stock.refused(w, ErrImagePull)
	if !unreachable(&e) || !strings.Contains(e.Message, "connection refused") {
		t.Errorf("got %v", e)
	}
	if got := ours.must(w); got != want {
		t.Error("got another image than the one that is there")
	}
	ours.wantEvents(`Normal Pulling Pulling image "offline.test/app:1"`,
		`Normal Pulled Container image "offline.test/app:1" already present on machine and used as it is: `+e.Message)
	// For a while nobody tries: a dial may take long to fail.
	ours.must(w)
	ours.wantEvents(`Normal Pulled Container image "offline.test/app:1" already present on machine and used as it is: its registry could not be reached a moment ago`)
	ours.pass(silentFor)
	ours.must(w)
	ours.mu.Lock()
	if len(ours.events) != 2 || !strings.HasPrefix(ours.events[0], "Normal Pulling") {
		t.Errorf("after a while it was not tried again: %q", ours.events)
	}
	ours.mu.Unlock()
	// Nothing comes from nothing, and a registry that answers has the last word.
	ours.refused(work("u", "offline.test/none:1", always), ErrImagePull)
	push(t, s.reg, "fairlead.test/withdrawn:1", "x")
	ours.must(work("u", "fairlead.test/withdrawn:1", always))
	s.reg.Private("withdrawn", "ann", "right")
	ours.refused(work("u", "fairlead.test/withdrawn:1", always), ErrImagePull)
}
