package probe

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/fairlead-io/fairlead/edge/pods/spec"
)

// userAgent is what probed servers see of the stock kubelet.
const userAgent = "kube-probe/1.37"

const (
	retries   = 3        // for a probe that could not be made
	maxOutput = 10 << 10 // of an answer, in bytes
)

type outcome int8

const (
	passed outcome = iota
	warned
	failed
)

// verdict is what one run has shown. err is for a run that could not be made: it
// counts neither for nor against the container.
type verdict struct {
	outcome outcome
	output  string
	err     error
}

func (p *Prober) runWithRetries(ctx context.Context, s *corev1.Probe, c *corev1.Container, id, ip string) (v verdict) {
	for range retries {
		if v = p.run(ctx, s, c, id, ip); v.err == nil || ctx.Err() != nil {
			break
		}
	}
	return v
}

func (p *Prober) run(ctx context.Context, s *corev1.Probe, c *corev1.Container, id, ip string) verdict {
	timeout := time.Duration(max(s.TimeoutSeconds, 1)) * time.Second
	switch {
	case s.Exec != nil:
		return p.runExec(ctx, s.Exec, c, id, timeout)
	case s.HTTPGet != nil:
		return p.runHTTP(ctx, s.HTTPGet, c, ip, timeout)
	case s.TCPSocket != nil:
		return runTCP(ctx, s.TCPSocket, c, ip, timeout)
	case s.GRPC != nil:
		return runGRPC(ctx, s.GRPC, ip, timeout)
	}
	return verdict{err: fmt.Errorf("missing probe handler for container %s", c.Name)}
}

func (p *Prober) runExec(ctx context.Context, a *corev1.ExecAction, c *corev1.Container, id string, timeout time.Duration) verdict {
	out, code, err := p.cfg.Exec(ctx, id, command(a.Command, c.Env), timeout)
	if len(out) > maxOutput {
		out = out[:maxOutput]
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded), status.Code(err) == codes.DeadlineExceeded:
		return verdict{outcome: failed, output: fmt.Sprintf("command timed out: %q timed out after %s", strings.Join(command(a.Command, c.Env), " "), timeout)}
	case err != nil:
		return verdict{err: err}
	case code != 0:
		return verdict{outcome: failed, output: string(out)}
	}
	return verdict{outcome: passed, output: string(out)}
}

// command expands the variables that the spec gives in plain. Others stay as they
// are: a probe does not see references.
func command(words []string, env []corev1.EnvVar) []string {
	vars := make([]*runtimeapi.KeyValue, 0, len(env))
	for _, e := range env {
		vars = append(vars, &runtimeapi.KeyValue{Key: e.Name, Value: []byte(e.Value)})
	}
	out := make([]string, 0, len(words))
	for _, w := range words {
		out = append(out, spec.Expand(w, vars))
	}
	return out
}

// dialer keeps closed connections in TIME-WAIT for a second only.
var dialer = &net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
	return c.Control(func(fd uintptr) {
		_ = syscall.SetsockoptLinger(int(fd), syscall.SOL_SOCKET, syscall.SO_LINGER, &syscall.Linger{Onoff: 1, Linger: 1})
	})
}}

func transport() *http.Transport {
	return &http.Transport{
		// A probe asks whether a server answers, not who it is.
		TLSClientConfig:     &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // as the stock kubelet: certificates are not looked at
		DialContext:         dialer.DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		DisableKeepAlives:   true,
		DisableCompression:  true,
		ForceAttemptHTTP2:   true,
	}
}

func (p *Prober) runHTTP(ctx context.Context, a *corev1.HTTPGetAction, c *corev1.Container, ip string, timeout time.Duration) verdict {
	req, err := httpRequest(ctx, a, c, ip)
	if err != nil {
		return verdict{err: err}
	}
	client := &http.Client{Timeout: timeout, Transport: p.http, CheckRedirect: sameHost}
	res, err := client.Do(req)
	if err != nil {
		return verdict{outcome: failed, output: err.Error()}
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxOutput))
	switch {
	case err != nil:
		return verdict{err: err}
	case res.StatusCode < 200 || res.StatusCode >= 400:
		// Without the body: it may hold what is not meant for events.
		return verdict{outcome: failed, output: fmt.Sprintf("HTTP probe failed with statuscode: %d", res.StatusCode)}
	case res.StatusCode >= 300:
		return verdict{outcome: warned, output: fmt.Sprintf("Probe terminated redirects, Response body: %s", body)}
	}
	return verdict{outcome: passed, output: string(body)}
}

// sameHost follows redirects on the same host only.
func sameHost(req *http.Request, via []*http.Request) error {
	if req.URL.Hostname() != via[0].URL.Hostname() {
		return http.ErrUseLastResponse
	}
	if len(via) >= 10 {
		return errors.New("stopped after 10 redirects")
	}
	return nil
}

func httpRequest(ctx context.Context, a *corev1.HTTPGetAction, c *corev1.Container, ip string) (*http.Request, error) {
	n, err := port(a.Port, c)
	if err != nil {
		return nil, err
	}
	u, err := url.Parse(a.Path)
	if err != nil {
		u = &url.URL{Path: a.Path}
	}
	u.Scheme, u.Host = "http", address(a.Host, ip, n)
	if a.Scheme != "" {
		u.Scheme = strings.ToLower(string(a.Scheme))
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for _, h := range a.HTTPHeaders {
		req.Header.Add(h.Name, h.Value)
	}
	if _, ok := req.Header["User-Agent"]; !ok {
		req.Header.Set("User-Agent", userAgent)
	}
	if accept, ok := req.Header["Accept"]; !ok {
		req.Header.Set("Accept", "*/*")
	} else if accept[0] == "" {
		req.Header.Del("Accept")
	}
	req.Host = req.Header.Get("Host")
	return req, nil
}

func runTCP(ctx context.Context, a *corev1.TCPSocketAction, c *corev1.Container, ip string, timeout time.Duration) verdict {
	n, err := port(a.Port, c)
	if err != nil {
		return verdict{err: err}
	}
	d := *dialer
	d.Timeout = timeout
	conn, err := d.DialContext(ctx, "tcp", address(a.Host, ip, n))
	if err != nil {
		return verdict{outcome: failed, output: err.Error()}
	}
	_ = conn.Close()
	return verdict{outcome: passed}
}

func runGRPC(ctx context.Context, a *corev1.GRPCAction, ip string, timeout time.Duration) verdict {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	addr := address("", ip, int(a.Port))
	conn, err := grpc.NewClient("passthrough:///"+addr,
		grpc.WithUserAgent(userAgent), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return dialer.DialContext(ctx, "tcp", addr) }))
	if err != nil {
		return verdict{outcome: failed, output: fmt.Sprintf("error: failed to connect service at %q: %+v", addr, err)}
	}
	defer conn.Close()
	conn.Connect()
	for s := conn.GetState(); s != connectivity.Ready; s = conn.GetState() {
		if !conn.WaitForStateChange(ctx, s) {
			return verdict{outcome: failed, output: fmt.Sprintf("timeout: failed to connect service %q within %v: %+v", addr, timeout, ctx.Err())}
		}
	}
	req := &health.HealthCheckRequest{}
	if a.Service != nil {
		req.Service = *a.Service
	}
	res, err := health.NewHealthClient(conn).Check(ctx, req)
	switch code := status.Code(err); {
	case code == codes.Unimplemented:
		return verdict{outcome: failed, output: "error: this server does not implement the grpc health protocol (grpc.health.v1.Health): " + status.Convert(err).Message()}
	case code == codes.DeadlineExceeded:
		return verdict{outcome: failed, output: fmt.Sprintf("timeout: health rpc did not complete within %v", timeout)}
	case err != nil:
		return verdict{outcome: failed, output: fmt.Sprintf("error: health rpc probe failed: %+v", err)}
	case res.GetStatus() != health.HealthCheckResponse_SERVING:
		return verdict{outcome: failed, output: fmt.Sprintf("service unhealthy (responded with %q)", res.GetStatus().String())}
	}
	return verdict{outcome: passed, output: "service healthy"}
}

func address(host, ip string, port int) string {
	if host == "" {
		host = ip
	}
	return net.JoinHostPort(host, strconv.Itoa(port))
}

// port resolves a port's number or name.
func port(p intstr.IntOrString, c *corev1.Container) (int, error) {
	n := p.IntValue()
	if p.Type == intstr.String {
		n = 0
		for _, cp := range c.Ports {
			if cp.Name == p.StrVal {
				n = int(cp.ContainerPort)
				break
			}
		}
		if n == 0 {
			return 0, fmt.Errorf("port %q not found", p.StrVal)
		}
	}
	if n <= 0 || n > 65535 {
		return 0, fmt.Errorf("invalid port number: %d", n)
	}
	return n, nil
}
