package pods

import (
	"cmp"
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
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	// hookBody is how much of a hook's answer is read, so that the connection can end well.
	hookBody = 10 << 10
	// hookTimeout bounds an HTTP hook: the stock kubelet has no bound but the
	// grace period, and a postStart hook that hangs would hang the pod.
	hookTimeout = 2 * time.Minute
)

// hook runs a lifecycle handler. The message, for the container's status, may
// hold what the command printed; the events say less, as that may be a secret.
func (p *pod) hook(ctx context.Context, pod *corev1.Pod, c *corev1.Container, id string, ips []string, h *corev1.LifecycleHandler) (message string, err error) {
	name := formatPod(pod)
	switch {
	case h.Exec != nil:
		out, err := p.e.exec(ctx, id, h.Exec.Command, 0)
		if err != nil {
			return fmt.Sprintf("Exec lifecycle hook (%v) for Container %q in Pod %q failed - error: %v, message: %q", h.Exec.Command, c.Name, name, err, out), err
		}
		return "", nil
	case h.HTTPGet != nil:
		if err := httpHook(ctx, c, h.HTTPGet, ips); err != nil {
			return fmt.Sprintf("HTTP lifecycle hook (%s) for Container %q in Pod %q failed - error: %v", h.HTTPGet.Path, c.Name, name, err), err
		}
		return "", nil
	case h.Sleep != nil:
		t := time.NewTimer(time.Duration(h.Sleep.Seconds) * time.Second)
		defer t.Stop()
		select {
		case <-t.C:
			return "", nil
		case <-ctx.Done():
			err := errors.New("container terminated before sleep hook finished")
			return fmt.Sprintf("Sleep lifecycle hook (%d) for Container %q in Pod %q failed - error: %v", h.Sleep.Seconds, c.Name, name, err), err
		}
	default: // tcpSocket was never run by a kubelet; the API server accepts it
		err := fmt.Errorf("invalid handler: %v", h)
		return fmt.Sprintf("Cannot run handler: %v", err), err
	}
}

// httpHook asks as the kubelet does: any answer will do, certificates are not
// looked at, and an HTTPS hook that is answered in HTTP is asked so.
func httpHook(ctx context.Context, c *corev1.Container, g *corev1.HTTPGetAction, ips []string) error {
	host := g.Host
	if host == "" {
		if len(ips) == 0 {
			return errors.New("the pod has no IP yet")
		}
		host = ips[0]
	}
	port, err := portOf(c, g.Port)
	if err != nil {
		return err
	}
	u, err := url.Parse(g.Path)
	if err != nil {
		u = &url.URL{Path: g.Path}
	}
	u.Scheme, u.Host = strings.ToLower(string(cmp.Or(g.Scheme, corev1.URISchemeHTTP))), net.JoinHostPort(host, strconv.Itoa(port))
	ctx, cancel := context.WithTimeout(ctx, hookTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "kube-lifecycle/fairlead")
	req.Header.Set("Accept", "*/*")
	for _, h := range g.HTTPHeaders {
		if http.CanonicalHeaderKey(h.Name) == "Host" {
			req.Host = h.Value
			continue
		}
		req.Header.Add(h.Name, h.Value)
	}
	tr := &http.Transport{DisableKeepAlives: true, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}} //nolint:gosec // as the stock kubelet: a pod's certificate names no IP
	defer tr.CloseIdleConnections()
	cl := &http.Client{Transport: tr}
	resp, err := cl.Do(req)
	if err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		req = req.Clone(ctx)
		req.URL.Scheme = "http"
		req.Header.Del("Authorization")
		resp, err = cl.Do(req)
	}
	if err != nil {
		return err
	}
	_, _ = io.CopyN(io.Discard, resp.Body, hookBody)
	return resp.Body.Close()
}

// portOf resolves a port's name by the container's list.
func portOf(c *corev1.Container, p intstr.IntOrString) (int, error) {
	n := p.IntValue()
	if p.Type == intstr.String {
		for _, cp := range c.Ports {
			if cp.Name == p.StrVal {
				return int(cp.ContainerPort), nil
			}
		}
	}
	if n < 1 || n > 65535 {
		return 0, fmt.Errorf("port %q: want 1 to 65535 or the name of one of the container's ports", p.String())
	}
	return n, nil
}

// formatPod names a pod as the kubelet does in its messages.
func formatPod(p *corev1.Pod) string { return fmt.Sprintf("%s_%s(%s)", p.Name, p.Namespace, p.UID) }
