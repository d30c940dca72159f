package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/mochi-mqtt/server/v2/packets"

	"github.com/fairlead-io/fairlead/broker"
	"github.com/fairlead-io/fairlead/broker/client"
	"github.com/fairlead-io/fairlead/broker/client/wsconn"
	"github.com/fairlead-io/fairlead/broker/client/zconn"
)

// certificate makes one for 127.0.0.1 that signs itself; file is what trusts it.
func certificate(t *testing.T) (server, trusts *tls.Config, file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "cloud"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	file = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(b)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, file
}

func openTLS(t *testing.T, change ...func(*broker.Options)) (b *broker.Broker, trusts *tls.Config, ca string) {
	t.Helper()
	server, trusts, ca := certificate(t)
	b, _ = open(t, t.TempDir(), append(change, func(o *broker.Options) { o.TLS = server })...)
	return b, trusts, ca
}

func dialer(t *testing.T, addr string, cfg *tls.Config) *client.Dialer {
	t.Helper()
	d, err := client.ParseURL(addr, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// Over TLS and WebSocket, who asks for it gets a compressed connection, beside
// those who do not.
func TestCompressed(t *testing.T) {
	b, trusts, _ := openTLS(t)
	for _, x := range []struct {
		addr string
		can  bool
	}{
		{"mqtts://127.0.0.1:0", true}, {"wss://127.0.0.1:0/mqtt", true}, {"ws://127.0.0.1:0/mqtt", true}, {"mqtt://127.0.0.1:0", false},
	} {
		t.Run(x.addr[:5], func(t *testing.T) {
			at := listen(t, b, x.addr)
			d := dialer(t, at, trusts)
			want := strings.Repeat("x", 300_000)
			for name, dial := range map[string]func(context.Context) (net.Conn, error){"plain": d.Dial, "compressed": d.DialCompressed} {
				c, err := dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if _, is := c.(*zconn.Conn); is != (x.can && name == "compressed") {
					t.Errorf("%s: got %T", name, c)
				}
				_ = c.Close()
				mc, msgs := dialWith(t, at, dial, client.Subscription{Filter: "a/#", QoS: 1})
				if err := mc.Publish(t.Context(), client.Message{Topic: "a/b", Payload: []byte(want), QoS: 1}); err != nil {
					t.Fatal(err)
				}
				if m := next(t, msgs); string(m.Payload) != want {
					t.Errorf("%s: got %d bytes", name, len(m.Payload))
				}
			}
		})
	}
}

// dialWith runs a client over connections that dial makes.
func dialWith(t *testing.T, addr string, dial func(context.Context) (net.Conn, error), subs ...client.Subscription) (*client.Client, <-chan client.Message) {
	t.Helper()
	msgs, up := make(chan client.Message, 100), make(chan struct{}, 10)
	c, err := client.New(client.Config{
		URL: addr, Dial: dial, ClientID: t.Name(), Subscriptions: subs,
		OnMessage: func(m client.Message) { msgs <- m }, OnUp: func(context.Context) { up <- struct{}{} },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	select {
	case <-up:
	case <-time.After(patience):
		t.Fatal("the client did not get through")
	}
	return c, msgs
}

// Debian's clients over TLS, with ALPN and without, notice nothing.
func TestMosquittoTLS(t *testing.T) {
	b, _, ca := openTLS(t)
	addr := strings.TrimPrefix(listen(t, b, "mqtts://127.0.0.1:0"), "mqtts://")
	for _, alpn := range [][]string{nil, {"--tls-alpn", "mqtt"}} {
		args := append([]string{"--cafile", ca, "-q", "1", "-t", "over/tls"}, alpn...)
		if out, err := mosquitto(t, "mosquitto_pub", addr, append(args, "-m", "hello", "-r")...).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%v: %v: %s", alpn, err, out)
		}
		if out, err := mosquitto(t, "mosquitto_sub", addr, append(args, "-C", "1", "-W", "20")...).CombinedOutput(); err != nil || string(out) != "hello\n" {
			t.Errorf("%v: %v: %s", alpn, err, out)
		}
	}
}

// What a listener within TLS and a WebSocket one agree on, and what they refuse.
func TestNegotiation(t *testing.T) {
	b, trusts, _ := openTLS(t)
	addr := strings.TrimPrefix(listen(t, b, "mqtts://127.0.0.1:0"), "mqtts://")
	for _, x := range []struct {
		offer []string
		max   uint16
		want  string
		fails bool
	}{
		{nil, 0, "", false},
		{[]string{"mqtt"}, 0, "mqtt", false},
		{[]string{"mqtt", zconn.Protocol}, tls.VersionTLS12, zconn.Protocol, false},
		{[]string{zconn.Protocol}, 0, zconn.Protocol, false},
		{[]string{"http/1.1"}, 0, "", true},
		{nil, tls.VersionTLS11, "", true},
	} {
		cfg := trusts.Clone()
		cfg.NextProtos, cfg.MaxVersion, cfg.MinVersion = x.offer, x.max, tls.VersionTLS10
		c, err := tls.Dial("tcp", addr, cfg)
		if (err != nil) != x.fails {
			t.Errorf("%v: %v", x.offer, err)
		}
		if err == nil {
			if got := c.ConnectionState().NegotiatedProtocol; got != x.want {
				t.Errorf("%v: got %q, want %q", x.offer, got, x.want)
			}
			_ = c.Close()
		}
	}
	for scheme, cfg := range map[string]*tls.Config{"ws": nil, "wss": trusts} {
		at := listen(t, b, scheme+"://127.0.0.1:0/mqtt")
		for _, x := range []struct{ offer, want string }{
			{"mqtt", "mqtt"}, {zconn.Protocol + ",mqtt", zconn.Protocol}, {zconn.Protocol, zconn.Protocol}, {"chat,mqtt", "mqtt"}, {"chat", ""},
		} {
			wd := websocket.Dialer{Subprotocols: strings.Split(x.offer, ","), TLSClientConfig: cfg}
			ws, resp, err := wd.DialContext(t.Context(), at, nil)
			if resp == nil {
				t.Fatal(err)
			}
			_ = resp.Body.Close()
			if (err != nil) != (x.want == "") {
				t.Errorf("%s %s: %v", scheme, x.offer, err)
			}
			if err != nil {
				continue
			}
			if ws.Subprotocol() != x.want {
				t.Errorf("%s %s: got %q", scheme, x.offer, ws.Subprotocol())
			}
			if x.want == wsconn.Subprotocol { // a browser's frames are what they always were
				r := newRaw(t, wsconn.New(ws), 5)
				r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "browser"}})
				r.expect(packets.Connack)
			}
			_ = ws.Close()
		}
	}
}

// The limits of packets are those of what was inflated; who is disconnected is
// told, there as well.
func TestCompressedLimits(t *testing.T) {
	b, trusts, _ := openTLS(t, func(o *broker.Options) { o.MaxPacket = 5000 })
	for _, scheme := range []string{"mqtts://127.0.0.1:0", "ws://127.0.0.1:0/"} {
		d := dialer(t, listen(t, b, scheme), trusts)
		connected := func() *raw {
			c, err := d.DialCompressed(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			r := newRaw(t, c, 5)
			r.send(packets.Packet{FixedHeader: packets.FixedHeader{Type: packets.Connect}, Connect: packets.ConnectParams{ProtocolName: []byte("MQTT"), Clean: true, ClientIdentifier: "zip"}})
			r.expect(packets.Connack)
			return r
		}
		r := connected()
		r.send(publish("a", strings.Repeat("x", 6000), 1, false, 1))
		if bye := r.closed(); bye == nil || bye.ReasonCode != 0x95 {
			t.Errorf("%s: a packet beyond the limit: %+v", scheme, bye)
		}
		first := connected()
		connected()
		if bye := first.closed(); bye == nil || bye.ReasonCode != packets.ErrSessionTakenOver.Code {
			t.Errorf("%s: taken over: %+v", scheme, bye)
		}
	}
	// Before the CONNECT: what is no frame ends the connection.
	c, err := tls.Dial("tcp", strings.TrimPrefix(listen(t, b, "mqtts://127.0.0.1:0"), "mqtts://"), &tls.Config{RootCAs: trusts.RootCAs, MinVersion: tls.VersionTLS12, NextProtos: []string{zconn.Protocol}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.Write([]byte{0x80, 3, 0xff, 0xff, 0xff}); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(patience))
	if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("garbage: %v", err)
	}
}

// Who does not finish the handshake is cut off, and neither holds others up nor
// the broker's end.
func TestHandshakeEnds(t *testing.T) {
	for _, addr := range []string{"mqtts://127.0.0.1:0", "wss://127.0.0.1:0/"} {
		b, trusts, _ := openTLS(t, func(o *broker.Options) { o.ConnectDeadline = 200 * time.Millisecond })
		at := listen(t, b, addr)
		silent := tcpTo(t, at)
		plain := tcpTo(t, at)
		if _, err := io.WriteString(plain, "\x10\x0c\x00\x04MQTT\x05\x02\x00\x3c\x00\x00"); err != nil {
			t.Fatal(err)
		}
		dialWith(t, at, dialer(t, at, trusts).Dial)
		for _, c := range []net.Conn{silent, plain} {
			if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: the connection stays open", addr)
			}
		}
	}
	b, _, _ := openTLS(t, func(o *broker.Options) { o.ConnectDeadline = time.Hour })
	c := tcpTo(t, listen(t, b, "mqtts://127.0.0.1:0"))
	if _, err := c.Write([]byte{22, 3, 1}); err != nil { // as a handshake begins
		t.Fatal(err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

// tcpTo opens a connection that times out when a test has failed.
func tcpTo(t *testing.T, addr string) net.Conn {
	t.Helper()
	_, host, _ := strings.Cut(addr, "://")
	host, _, _ = strings.Cut(host, "/")
	c, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}
