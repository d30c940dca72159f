package client_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/client/zconn"
)

// A broker that knows nothing of compression is spoken to without it.
func TestDialCompressedElsewhere(t *testing.T) {
	path, err := exec.LookPath("mosquitto")
	if err != nil {
		if path, err = exec.LookPath("/usr/sbin/mosquitto"); err != nil {
			t.Skip("SKIP: mosquitto is missing (apt-get install mosquitto)")
		}
	}
	dir := t.TempDir()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cert := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, cert, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	k, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	crt := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	var ports [2]int
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ports[i] = l.Addr().(*net.TCPAddr).Port
		_ = l.Close()
	}
	conf := fmt.Sprintf("user root\nallow_anonymous true\nlistener %d 127.0.0.1\ncertfile %[2]s/crt\nkeyfile %[2]s/key\nlistener %[3]d 127.0.0.1\nprotocol websockets\n", ports[0], dir, ports[1])
	for name, b := range map[string][]byte{"crt": crt, "key": pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: k}), "conf": []byte(conf)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), path, "-c", filepath.Join(dir, "conf"))
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = log.Close() }()
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(log.Name())
			t.Logf("%s", b)
		}
	})
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(crt)
	for _, addr := range []string{fmt.Sprintf("mqtts://127.0.0.1:%d", ports[0]), fmt.Sprintf("ws://127.0.0.1:%d/mqtt", ports[1])} {
		d, err := client.ParseURL(addr, &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12})
		if err != nil {
			t.Fatal(err)
		}
		r := run(t, client.Config{URL: addr, Subscriptions: []client.Subscription{{Filter: "a/#", QoS: 1}}, Dial: func(ctx context.Context) (net.Conn, error) {
			c, err := d.DialCompressed(ctx)
			if _, is := c.(*zconn.Conn); is {
				t.Errorf("%s: mosquitto compresses?", addr)
			}
			return c, err
		}})
		receive(t, "up", r.up)
		if err := r.Publish(t.Context(), client.Message{Topic: "a/b", Payload: []byte("hello"), QoS: 1}); err != nil {
			t.Error(err)
		}
		if m := receive(t, "message", r.msgs); string(m.Payload) != "hello" {
			t.Errorf("got %q", m.Payload)
		}
		r.stop()
	}
}
