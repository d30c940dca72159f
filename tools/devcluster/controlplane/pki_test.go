package controlplane

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var loopback = net.IPv4(127, 0, 0, 1)

func testFolder(t *testing.T) folder {
	t.Helper()
	f, err := newFolder(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// pkiFiles reads all files of Dir/pki.
func pkiFiles(t *testing.T, f folder) map[string][]byte {
	t.Helper()
	names, err := filepath.Glob(f.path("pki", "*"))
	if err != nil || len(names) == 0 {
		t.Fatalf("no files in pki: %v", err)
	}
	files := map[string][]byte{}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Base(name)] = b
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: mode %v, %v; want 0600", name, info.Mode(), err)
		}
	}
	return files
}

// changed names the files that differ.
func changed(before, after map[string][]byte) []string {
	var names []string
	for name, b := range after {
		if !bytes.Equal(before[name], b) {
			names = append(names, name)
		}
	}
	return names
}

func TestPKIIsKeptUntilItNoLongerFits(t *testing.T) {
	now := time.Now()
	for _, tc := range []struct {
		name    string
		bind    net.IP
		now     time.Time
		prepare func(t *testing.T, f folder)
		want    func(file string) bool // true for the files to be replaced
	}{
		{name: "same again", bind: loopback, now: now, want: func(string) bool { return false }},
		{name: "a month from expiry", bind: loopback, now: now.Add(leafLife - renewBefore + time.Hour), want: func(file string) bool {
			return !strings.HasPrefix(file, "ca.") && !strings.HasPrefix(file, "front-proxy-ca.") && !strings.HasPrefix(file, "sa.")
		}},
		{name: "other address", bind: net.IPv4(192, 0, 2, 7), now: now, want: func(file string) bool {
			return file == "apiserver.crt" || file == "apiserver.key"
		}},
		{name: "crash between key and certificate", bind: loopback, now: now, prepare: func(t *testing.T, f folder) {
			other, err := os.ReadFile(f.path("pki", "scheduler.key"))
			if err != nil {
				t.Fatal(err)
			}
			if err := f.write(other, "pki", "admin.key"); err != nil {
				t.Fatal(err)
			}
		}, want: func(file string) bool { return file == "admin.crt" || file == "admin.key" }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := testFolder(t)
			if _, err := f.ensurePKI(loopback, now); err != nil {
				t.Fatal(err)
			}
			before := pkiFiles(t, f)
			if tc.prepare != nil {
				tc.prepare(t, f)
			}
			if _, err := f.ensurePKI(tc.bind, tc.now); err != nil {
				t.Fatal(err)
			}
			after := pkiFiles(t, f)
			replaced := map[string]bool{}
			for _, name := range changed(before, after) {
				replaced[name] = true
			}
			for name := range after {
				if got, want := replaced[name], tc.want(name); got != want {
					t.Errorf("%s: replaced %v, want %v", name, got, want)
				}
			}
		})
	}
}

func TestBrokenAuthorityIsNotReplaced(t *testing.T) {
	f := testFolder(t)
	if _, err := f.ensurePKI(loopback, time.Now()); err != nil {
		t.Fatal(err)
	}
	if err := f.write([]byte("garbage"), "pki", "ca.crt"); err != nil {
		t.Fatal(err)
	}
	_, err := f.ensurePKI(loopback, time.Now())
	if err == nil || !strings.Contains(err.Error(), "move the folder") {
		t.Fatalf("error %v; want one that says what to do", err)
	}
	if _, err := f.ensurePKI(loopback, time.Now().Add(authorityLife)); err == nil {
		t.Fatal("an expired authority was accepted")
	}
}

func TestCertificatesVerify(t *testing.T) {
	f := testFolder(t)
	p, err := f.ensurePKI(net.IPv4(192, 0, 2, 7), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(p.caPEM)
	verify := func(name string, pool *x509.CertPool, usage x509.ExtKeyUsage, host string) error {
		t.Helper()
		pair, err := f.readPair(name)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := tls.X509KeyPair(pair.cert, pair.key)
		if err != nil {
			t.Fatal(err)
		}
		_, err = cert.Leaf.Verify(x509.VerifyOptions{Roots: pool, DNSName: host, KeyUsages: []x509.ExtKeyUsage{usage}})
		return err
	}
	for _, host := range []string{"127.0.0.1", "192.0.2.7", "10.96.0.1", "localhost", "kubernetes.default.svc"} {
		if err := verify("apiserver", roots, x509.ExtKeyUsageServerAuth, host); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"admin", "controller-manager", "scheduler", "apiserver-kubelet-client"} {
		if err := verify(name, roots, x509.ExtKeyUsageClientAuth, ""); err != nil {
			t.Error(err)
		}
	}
	// An aggregated request must not pass for one of a user, nor the other way.
	if verify("front-proxy-client", roots, x509.ExtKeyUsageClientAuth, "") == nil {
		t.Error("the front proxy's certificate is one of the users' authority")
	}
	front := x509.NewCertPool()
	pair, err := f.readPair("front-proxy-ca")
	if err != nil {
		t.Fatal(err)
	}
	front.AppendCertsFromPEM(pair.cert)
	if err := verify("front-proxy-client", front, x509.ExtKeyUsageClientAuth, ""); err != nil {
		t.Error(err)
	}
}
