package probe

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func newProber(t *testing.T) *Prober {
	t.Helper()
	p, err := New(Config{
		Exec:    func(context.Context, string, []string, time.Duration) ([]byte, int, error) { return nil, 0, nil },
		Changed: func(types.UID) {}, Event: func(*corev1.Pod, string, string, string) {},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// web is a server that counts its open connections and keeps the last request.
type web struct {
	*httptest.Server
	at netip.AddrPort

	mu   sync.Mutex
	last *http.Request
	open map[net.Conn]bool
}

func serve(t *testing.T, tls bool, h http.HandlerFunc) *web {
	t.Helper()
	w := &web{open: map[net.Conn]bool{}}
	w.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.last = r
		w.mu.Unlock()
		h(rw, r)
	}))
	w.Config.ConnState = func(c net.Conn, s http.ConnState) {
		w.mu.Lock()
		defer w.mu.Unlock()
		if s == http.StateClosed {
			delete(w.open, c)
		} else {
			w.open[c] = true
		}
	}
	if tls {
		w.EnableHTTP2 = true
		w.StartTLS()
	} else {
		w.Start()
	}
	t.Cleanup(w.Close)
	w.at = netip.MustParseAddrPort(w.Listener.Addr().String())
	return w
}

func (w *web) port() intstr.IntOrString { return intstr.FromInt32(int32(w.at.Port())) }

// asked is the last request.
func (w *web) asked() *http.Request {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// idle waits until no connection is open.
func (w *web) idle(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(2 * time.Millisecond) {
		w.mu.Lock()
		n := len(w.open)
		w.mu.Unlock()
		if n == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d connections stay open", n)
		}
	}
}

func TestHTTP(t *testing.T) {
	elsewhere := serve(t, false, func(http.ResponseWriter, *http.Request) {})
	handler := func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
			fmt.Fprint(w, "fine")
		case "/made":
			w.WriteHeader(http.StatusCreated)
		case "/query":
			if r.URL.Query().Get("a") != "b" {
				w.WriteHeader(http.StatusBadRequest)
			}
		case "/down":
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprint(w, "the password is swordfish")
		case "/here":
			http.Redirect(w, r, "/ok", http.StatusFound)
		case "/away":
			w.Header().Set("Location", strings.Replace(elsewhere.URL, "127.0.0.1", "localhost", 1))
			w.WriteHeader(http.StatusFound)
			fmt.Fprint(w, "over there")
		case "/loop":
			http.Redirect(w, r, "/loop", http.StatusFound)
		case "/big":
			fmt.Fprint(w, strings.Repeat("x", 30<<10))
		case "/slow":
			<-r.Context().Done()
		case "/cut":
			w.Header().Set("Content-Length", "100")
			fmt.Fprint(w, "short")
		}
	}
	plain, secure := serve(t, false, handler), serve(t, true, handler)
	p := newProber(t)
	for _, tc := range []struct {
		name, path string
		tls        bool
		outcome    outcome
		output     string
		err        string
	}{
		{name: "ok", path: "/ok", output: "fine"},
		{name: "without a leading slash", path: "ok", output: "fine"},
		{name: "https is not verified", path: "/ok", tls: true, output: "fine"},
		{name: "created", path: "/made"},
		{name: "query", path: "/query?a=b"},
		{name: "status", path: "/down", outcome: failed, output: "HTTP probe failed with statuscode: 503"},
		{name: "redirect on the host", path: "/here", output: "fine"},
		{name: "redirect to another host", path: "/away", outcome: warned, output: "Probe terminated redirects, Response body: over there"},
		{name: "redirect for ever", path: "/loop", outcome: failed, output: `Get "/loop": stopped after 10 redirects`},
		{name: "long answer", path: "/big", output: strings.Repeat("x", 10<<10)},
		{name: "slow", path: "/slow", outcome: failed, output: fmt.Sprintf(`Get "%s/slow": context deadline exceeded (Client.Timeout exceeded while awaiting headers)`, plain.URL)},
		{name: "cut off", path: "/cut", err: "unexpected EOF"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			w := plain
			a := &corev1.HTTPGetAction{Path: tc.path, Port: plain.port()}
			if tc.tls {
				w = secure
				a.Port, a.Scheme = secure.port(), corev1.URISchemeHTTPS
			}
			v := p.run(t.Context(), &corev1.Probe{TimeoutSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: a}}, &corev1.Container{}, "", "127.0.0.1")
			checkVerdict(t, v, tc.outcome, tc.output, tc.err)
			w.idle(t)
		})
	}
	if last := secure.asked(); last.Proto != "HTTP/2.0" {
		t.Errorf("https spoke %s", last.Proto)
	}
	if elsewhere.asked() != nil {
		t.Error("the other host was asked")
	}
}

func checkVerdict(t *testing.T, v verdict, o outcome, output, err string) {
	t.Helper()
	switch {
	case err == "" && v.err != nil, err != "" && (v.err == nil || v.err.Error() != err):
		t.Errorf("error %v, want %q", v.err, err)
	case v.outcome != o && err == "":
		t.Errorf("outcome %d, want %d: %.200s", v.outcome, o, v.output)
	case v.output != output:
		t.Errorf("output %.300q, want %.300q", v.output, output)
	}
}

func TestHTTPHeaders(t *testing.T) {
	w := serve(t, false, func(http.ResponseWriter, *http.Request) {})
	p := newProber(t)
	for _, tc := range []struct {
		name    string
		headers []corev1.HTTPHeader
		host    string
		want    map[string][]string
	}{
		{"none", nil, w.at.String(), map[string][]string{"User-Agent": {"kube-probe/1.37"}, "Accept": {"*/*"}}},
		{"own", []corev1.HTTPHeader{{Name: "X-A", Value: "1"}, {Name: "x-a", Value: "2"}, {Name: "User-Agent", Value: "me"}, {Name: "Accept", Value: "text/plain"}}, w.at.String(),
			map[string][]string{"User-Agent": {"me"}, "Accept": {"text/plain"}, "X-A": {"1", "2"}}},
		{"no accept", []corev1.HTTPHeader{{Name: "Accept", Value: ""}}, w.at.String(), map[string][]string{"User-Agent": {"kube-probe/1.37"}}},
		{"host", []corev1.HTTPHeader{{Name: "Host", Value: "shop.test"}}, "shop.test", map[string][]string{"User-Agent": {"kube-probe/1.37"}, "Accept": {"*/*"}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := &corev1.Container{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: int32(w.at.Port())}}}
			a := &corev1.HTTPGetAction{Host: "127.0.0.1", Port: intstr.FromString("http"), HTTPHeaders: tc.headers}
			checkVerdict(t, p.run(t.Context(), &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: a}}, c, "", "192.0.2.1"), passed, "", "")
			last := w.asked()
			got := last.Header
			got.Del("Connection")
			if len(got) != len(tc.want) {
				t.Errorf("headers %v, want %v", got, tc.want)
			}
			for k, v := range tc.want {
				if !slices.Equal(got[k], v) {
					t.Errorf("%s: %q, want %q", k, got[k], v)
				}
			}
			if last.Host != tc.host {
				t.Errorf("host %q, want %q", last.Host, tc.host)
			}
		})
	}
}

// closedPort is a port of this machine on which nobody listens.
func closedPort(t *testing.T) int32 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return int32(netip.MustParseAddrPort(l.Addr().String()).Port())
}

func TestTCP(t *testing.T) {
	w, none := serve(t, false, func(http.ResponseWriter, *http.Request) {}), closedPort(t)
	c := &corev1.Container{Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: int32(w.at.Port())}}}
	p := newProber(t)
	for _, tc := range []struct {
		name    string
		action  corev1.TCPSocketAction
		outcome outcome
		output  string
		err     string
	}{
		{name: "number", action: corev1.TCPSocketAction{Port: w.port()}},
		{name: "name", action: corev1.TCPSocketAction{Port: intstr.FromString("http")}},
		{name: "host", action: corev1.TCPSocketAction{Port: w.port(), Host: "localhost"}},
		{name: "refused", action: corev1.TCPSocketAction{Port: intstr.FromInt32(none)}, outcome: failed, output: fmt.Sprintf("dial tcp 127.0.0.1:%d: connect: connection refused", none)},
		{name: "unknown name", action: corev1.TCPSocketAction{Port: intstr.FromString("metrics")}, err: `port "metrics" not found`},
		{name: "no port", action: corev1.TCPSocketAction{Port: intstr.FromInt32(70000)}, err: "invalid port number: 70000"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := p.run(t.Context(), &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &tc.action}}, c, "", "127.0.0.1")
			checkVerdict(t, v, tc.outcome, tc.output, tc.err)
			w.idle(t)
		})
	}
}

type healthServer struct {
	health.UnimplementedHealthServer
	mu    sync.Mutex
	agent string
}

func (h *healthServer) Check(ctx context.Context, r *health.HealthCheckRequest) (*health.HealthCheckResponse, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	h.mu.Lock()
	h.agent = strings.Join(md.Get("user-agent"), " ")
	h.mu.Unlock()
	switch r.Service {
	case "", "up":
		return &health.HealthCheckResponse{Status: health.HealthCheckResponse_SERVING}, nil
	case "down":
		return &health.HealthCheckResponse{Status: health.HealthCheckResponse_NOT_SERVING}, nil
	case "slow":
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return nil, status.Error(codes.NotFound, "unknown service")
}

func TestGRPC(t *testing.T) {
	start := func(h *healthServer) int32 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s := grpc.NewServer(grpc.Creds(insecure.NewCredentials()))
		if h != nil {
			health.RegisterHealthServer(s, h)
		}
		done := make(chan struct{})
		go func() { defer close(done); _ = s.Serve(l) }()
		t.Cleanup(func() { s.Stop(); <-done })
		return int32(netip.MustParseAddrPort(l.Addr().String()).Port())
	}
	h := &healthServer{}
	up, bare, none := start(h), start(nil), closedPort(t)
	service := func(s string) *string { return &s }
	p := newProber(t)
	for _, tc := range []struct {
		name    string
		action  corev1.GRPCAction
		outcome outcome
		output  string
	}{
		{"whole server", corev1.GRPCAction{Port: up}, passed, "service healthy"},
		{"service", corev1.GRPCAction{Port: up, Service: service("up")}, passed, "service healthy"},
		{"not serving", corev1.GRPCAction{Port: up, Service: service("down")}, failed, `service unhealthy (responded with "NOT_SERVING")`},
		{"unknown service", corev1.GRPCAction{Port: up, Service: service("other")}, failed, "error: health rpc probe failed: rpc error: code = NotFound desc = unknown service"},
		{"slow", corev1.GRPCAction{Port: up, Service: service("slow")}, failed, "timeout: health rpc did not complete within 1s"},
		{"no health service", corev1.GRPCAction{Port: bare}, failed, "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): unknown service grpc.health.v1.Health"},
		{"nobody listens", corev1.GRPCAction{Port: none}, failed, fmt.Sprintf(`timeout: failed to connect service "127.0.0.1:%d" within 1s: context deadline exceeded`, none)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := p.run(t.Context(), &corev1.Probe{TimeoutSeconds: 1, ProbeHandler: corev1.ProbeHandler{GRPC: &tc.action}}, &corev1.Container{}, "", "127.0.0.1")
			checkVerdict(t, v, tc.outcome, tc.output, "")
		})
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if !strings.HasPrefix(h.agent, "kube-probe/1.37 ") {
		t.Errorf("user agent %q", h.agent)
	}
}

func TestExecCommand(t *testing.T) {
	env := []corev1.EnvVar{{Name: "PORT", Value: "80"}, {Name: "KEY", ValueFrom: &corev1.EnvVarSource{}}}
	got := command([]string{"check", "$(PORT)", "$$(PORT)", "$(OTHER)"}, env)
	if want := []string{"check", "80", "$(PORT)", "$(OTHER)"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestNoHandler(t *testing.T) {
	v := newProber(t).run(t.Context(), &corev1.Probe{}, &corev1.Container{Name: "web"}, "", "")
	checkVerdict(t, v, passed, "", "missing probe handler for container web")
}
